"""Several tensors are read at once: a bounded number of them, in any order, with the same result."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from support.models import hf_tiny
from support.models.small import mesh_of

from jmoe.checkpoint import convert, load_model, read_config, workers
from jmoe.checkpoint.load import match, read_param
from jmoe.checkpoint.quantised.codings import Quantize, read_codings
from jmoe.checkpoint.source import source_of
from jmoe.checkpoint.workers import MOST, Workers
from jmoe.config.moe import MoEConfig
from jmoe.models.decoder import make_blueprint

LONG = 60  # seconds, after which a thread that waits for another has failed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workers")
    hf_tiny.write_checkpoint(root, hf_tiny.hf_config(hidden_size=64, moe_intermediate_size=64))
    return root


class Backwards(Workers):
    """Works on one item at a time, the last one first."""

    def each(self, function: Callable, items: Sequence) -> None:
        for item in reversed(items):
            function(item)


def all_arrays(folder: Path, request: Quantize | None, readers: Workers) -> dict[str, list[np.ndarray]]:
    cfg = read_config(folder)
    codings = read_codings(folder, cfg, request)
    blueprint = make_blueprint(cfg, MoEConfig(), mesh_of((1, 1, 1)), codings)
    with source_of(folder).open() as checkpoint, readers:
        _, specs, table = match(checkpoint, blueprint, own_dtypes=True)
        return {
            path: jax.tree.leaves(read_param(checkpoint, spec, table[path], readers))
            for path, spec in specs.items()
        }


@pytest.mark.parametrize("request_", [None, Quantize("int4"), Quantize("mxfp4")], ids=str)
def test_the_order_changes_nothing(folder: Path, request_: Quantize | None):
    want = all_arrays(folder, request_, Workers(1))
    for readers in (Backwards(1), Workers(4)):
        got = all_arrays(folder, request_, readers)
        assert got.keys() == want.keys()
        for path, arrays in want.items():
            for ours, theirs in zip(got[path], arrays, strict=True):
                np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8), err_msg=path)


class Meeting:
    """Counts the calls that run at once; each waits until ``count`` of them do."""

    def __init__(self, count: int):
        self.most = self._running = 0
        self._lock, self._barrier = threading.Lock(), threading.Barrier(count)

    def __enter__(self) -> None:
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        self._barrier.wait(LONG)

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._running -= 1


def load(folder: Path, to: Path) -> None:
    load_model(folder, mesh_of((1, 1, 1)), quantize=Quantize("int4"))


def write(folder: Path, to: Path) -> None:
    convert(folder, to, quantize=Quantize("int4"))


@pytest.mark.parametrize("run", [load, write])
def test_as_many_tensors_as_threads_are_in_flight(run: Callable, folder, tmp_path, monkeypatch):
    """There are 16 and 8 tensors of experts in a parameter: they come by fours."""
    import jmoe.checkpoint.load as module

    meeting, read_slice = Meeting(MOST), module.read_slice

    def watched(checkpoint, tensor, *rest) -> None:
        if ".experts." not in tensor.name:
            return read_slice(checkpoint, tensor, *rest)
        with meeting:
            read_slice(checkpoint, tensor, *rest)

    monkeypatch.setattr(module, "read_slice", watched)
    monkeypatch.setattr(workers, "usable_cores", lambda: 64)
    run(folder, tmp_path / "out")
    assert meeting.most == MOST == 4


def test_no_more_items_are_worked_on_than_there_are_threads():
    meeting, done = Meeting(3), []

    def work(item: int) -> None:
        with meeting:
            done.append(item)

    with Workers(3) as three:
        three.each(work, range(12))
    assert meeting.most == 3 and sorted(done) == list(range(12))


def test_the_error_of_the_first_item_is_raised_and_the_rest_is_left_out():
    has_failed, may_end, begun = threading.Event(), threading.Event(), []

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            has_failed.set()
            raise ValueError("the second")
        if item == 0:
            assert has_failed.wait(LONG)
            raise ValueError("the first")
        assert may_end.wait(LONG)

    with Workers(2) as two:
        with pytest.raises(ValueError, match="the first"):
            two.each(work, range(100))
        may_end.set()
    assert len(begun) <= 4  # two that failed, and two that waited when the error was raised
