"""Tests the four techniques in pairs and all together, on meshes and in batches of several lengths.

The lossless techniques, shuffling and offload, must not change the results of the others: tokens and counts
are the same as without them. There are two exceptions: a capacity with shuffling, which changes the tokens of
a rank, and two lossy techniques. Then every assignment is accounted for, and requests that opted out get the
answers of a plain engine.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from support.models.offloaded import (
    EXPERTS,
    LAYERS,
    VOCAB,
    build,
    check_counters,
    check_pool,
    prompts,
    write_model,
)

from jmoe.checkpoint import load_model
from jmoe.checkpoint.identity import model_identity
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig, CapacityConfig, OffloadConfig, ShuffleConfig
from jmoe.engine.request import MoEUsage, Request, SamplingParams
from jmoe.mesh import make_mesh
from jmoe.placement.placement import Placement
from jmoe.placement.tables import Tables

BINNING = BinningConfig(bin_width=0.05)
CAPACITY = CapacityConfig(factor=0.5, policy="reroute", phase="both")
OFFLOAD = OffloadConfig(slots_per_layer=2)
GREEDY = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
COUNT = 6  # requests, more than run at once on the meshes with one batch
EXACT = (1, 4)  # requests that opt out of what is lossy
TP, DP, ALONE = ("tp", (1, 2, 1)), ("dp", (1, 2, 1)), ("dp", (1, 1, 1))
Where = tuple[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Run:
    """The work of an engine.

    tokens: tokens of every request.
    prefill: counts of the prefill steps.
    decode: counts of the decode steps.
    usages: what was reported to each request.
    """

    tokens: list[list[int]]
    prefill: dict
    decode: dict
    usages: list[MoEUsage | None]

    def exact(self) -> list[list[int]]:
        return [self.tokens[i] for i in EXACT]

    def changed(self) -> list[int]:
        both = self.prefill, self.decode
        return [sum(part[name] for part in both) for name in ("remapped", "rerouted", "dropped")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def placement(model: Path) -> str:
    """Writes a placement: experts anywhere on two ranks, and guesses that have nothing to do with it."""
    rng = np.random.default_rng(7)
    shares = [rng.dirichlet(np.ones(2), (LAYERS, n)).astype(np.float16) for n in (VOCAB, 4)]
    tables = Tables(*(part for s in shares for part in (s.argmax(-1).astype(np.int16), s.max(-1), s)))
    rows = rng.permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1)
    Placement(rows, 2, model_identity(load_model(model, make_mesh())), tables).save(model / "placement.npz")
    return str(model / "placement.npz")


@pytest.fixture(scope="module")
def ran(model: Path, placement: str) -> Iterator[Callable[[Where, str], Run]]:
    """Returns what an engine with some techniques (named by their first letters) did; each runs once."""
    known: dict[tuple[Where, str], Run] = {}
    every = {
        "b": {"binning": BINNING}, "c": {"capacity": CAPACITY}, "o": {"offload": OFFLOAD},
        "s": {"shuffle": ShuffleConfig(placement, history=True)},
    }  # fmt: skip

    def run(where: Where, techniques: str) -> Run:
        if (where, techniques) not in known:
            moe = MoEConfig()
            for letter in techniques:
                moe = replace(moe, **every[letter])
            known[where, techniques] = serve(model, where, moe)
        return known[where, techniques]

    yield run
    jax.clear_caches()


def serve(model: Path, where: Where, moe: MoEConfig) -> Run:
    attention, shape = where
    axes = ("data_parallel_size", "expert_parallel_size", "tensor_parallel_size")
    sizes = dict(zip(axes, shape, strict=True))
    outputs: list[list] = [[] for _ in range(COUNT)]
    requests = [
        Request(str(i), prompt, replace(GREEDY, max_tokens=5 + i, exact=i in EXACT), outputs[i].append, 0.0)
        for i, prompt in enumerate(prompts(COUNT))
    ]
    with closing(build(model, moe, attention=attention, **sizes)) as engine:
        engine.run(requests)
        stats = engine.moe_stats()
        if moe.offload is not None:
            check_counters(engine)
            check_pool(engine)
    usages = [parts[-1].moe for parts in outputs]
    return Run([r.token_ids for r in requests], stats["prefill"], stats["decode"], usages)


def check_accounts(run: Run, plain: Run) -> None:
    """Asserts that nothing is lost, requests get their own reports, and exact ones are left alone."""
    assert [len(t) for t in run.tokens] == [len(t) for t in plain.tokens]
    for ours, theirs in ((run.prefill, plain.prefill), (run.decode, plain.decode)):
        assert ours["assignments"] + ours["dropped"] == theirs["assignments"]
        assert sum(map(sum, ours["counts"])) == ours["assignments"]
    reported = [(u.remapped, u.rerouted, u.dropped) for u in run.usages if u is not None]
    assert np.sum(reported, axis=0).tolist() == run.changed()
    assert run.exact() == plain.exact()
    for i in EXACT:
        usage = run.usages[i]
        assert usage is not None and (usage.remapped, usage.rerouted, usage.dropped) == (0, 0, 0)


def cells(where: Where, *techniques: str) -> list[tuple[Where, str]]:
    return [(where, each) for each in techniques]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("where", "techniques"),
    [
        *cells(TP, "so", "bo", "bs", "co"),
        *cells(DP, "bco"),  # tests/engine/offload/test_serving.py has them two by two on one device
    ],
    ids=str,
)
def test_what_is_lossless_leaves_the_rest_as_it_is(ran, where: Where, techniques: str):
    lossy = "".join(each for each in techniques if each in "bc")
    ours, alone = ran(where, techniques), ran(where, lossy)
    assert ours.tokens == alone.tokens and ours.usages == alone.usages
    assert ours.changed() == alone.changed()
    assert ours.decode["counts"] == alone.decode["counts"]
    assert ours.prefill["counts"] == alone.prefill["counts"]
    if "b" in techniques:
        assert ours.decode["remapped"] > 0
    if "c" in techniques:
        assert ours.prefill["rerouted"] > 0
    if "o" in techniques:
        assert ours.decode["expert_cache_misses"] > 0 == alone.decode["expert_cache_misses"]
        assert ours.decode["prefetch_bytes"] > 0


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("where", "techniques"),
    [*cells(TP, "bcs", "bc", "cs"), *cells(DP, "bc")],  # test_binning.py has "bc" on one device
    ids=str,
)
def test_what_is_lossy_loses_nothing_unsaid_and_leaves_exact_requests_alone(
    ran, where: Where, techniques: str
):
    ours = ran(where, techniques)
    check_accounts(ours, ran(where, ""))
    assert ours.prefill["rerouted"] > 0
    assert (ours.decode["remapped"] > 0) == ("b" in techniques)


def test_all_four_together(ran):
    ours = ran(TP, "bcso")
    check_accounts(ours, ran(TP, ""))
    assert min(ours.decode[n] for n in ("remapped", "remote_assignments", "expert_cache_misses")) > 0


@pytest.mark.matrix
def test_all_four_are_what_three_are_without_offload(ran):
    ours, three = ran(TP, "bcso"), ran(TP, "bcs")
    assert ours.tokens == three.tokens and ours.usages == three.usages
    assert ours.changed() == three.changed()
    assert ours.decode["counts"] == three.decode["counts"]
    assert ours.prefill["counts"] == three.prefill["counts"]


@pytest.mark.parametrize(
    ("where", "moe", "message"),
    [
        (ALONE, "s", "another model or mesh: ranks 2, here 1"),
        (DP, "s", "moe.shuffle.tokens = true needs attention 'tp', got 'dp'"),
        (DP, "so", "moe.shuffle.tokens = true needs attention 'tp', got 'dp'"),
    ],
    ids=str,
)
def test_cells_that_mean_nothing_are_refused(ran, where: Where, moe: str, message: str):
    where = ("tp", where[1]) if where == ALONE else where
    with pytest.raises(ValueError, match=message):
        ran(where, moe)
