"""Quantised weights with each technique on meshes: tokens and counts are those of the same numbers elsewhere.

What is lossless gives the tokens of one device with all experts, in the same form. What is lossy depends on
the tokens that a rank has, so it is compared with a plain checkpoint of the dequantised numbers on the same
mesh; requests that opt out get the tokens of one device.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jmoe_kernels.quantised import Quantised, dequantised
from support.models import hf_tiny
from support.models.offloaded import check_pool

from jmoe.checkpoint import load_model
from jmoe.checkpoint.identity import model_identity
from jmoe.checkpoint.quantised.codings import CODINGS
from jmoe.checkpoint.quantised.quantise import quantise
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig, CapacityConfig, OffloadConfig, ShuffleConfig
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine
from jmoe.engine.request import MoEUsage, Request, SamplingParams
from jmoe.mesh import make_mesh
from jmoe.placement.placement import Placement
from jmoe.placement.tables import Tables

# rows of 32 and 64: groups of 32 are cut by tensor ranks
HIDDEN, INNER = 32, 64
SIZES: dict[str, Any] = {"moe_intermediate_size": INNER, "num_attention_heads": 8, "num_key_value_heads": 2}
LAYERS, EXPERTS, VOCAB = 2, 8, 96
SETTINGS = EngineSettings(
    max_model_len=64, dtype="float32", max_num_seqs=8, max_num_batched_tokens=64, kv_memory=1 << 20
)
COUNT = 8  # requests
EXACT = (1, 4)  # requests that opt out of what is lossy
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
BINNING = BinningConfig(bin_width=0.05)
CAPACITY = CapacityConfig(factor=0.5, policy="reroute", phase="both")
FORMS: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8", "quantize": "experts"},
    "int4": {"quantization": "int4", "quantize": "experts"},
    "int4 in all": {"quantization": "int4"},
}
Shape = tuple[int, int, int]  # data, expert, tensor
ALONE, EIGHT, PAIRS, CUBE, SLICES = (1, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8)


class Case(NamedTuple):
    """An engine.

    form: one of FORMS.
    shape: sizes of the mesh.
    techniques: first letters of the techniques.
    is_plain: whether the checkpoint has the dequantised numbers instead.
    """

    form: str
    shape: Shape
    techniques: str = ""
    is_plain: bool = False


@dataclass(frozen=True)
class Run:
    """The work of an engine.

    tokens: tokens of every request.
    counts: assignments of each layer to each expert, over all steps.
    changed: numbers of remapped, rerouted and dropped assignments.
    misses: experts that came from the host when decode steps needed them.
    usages: what was reported to each request.
    """

    tokens: list[list[int]]
    counts: list[list[int]]
    changed: tuple[int, ...]
    misses: int
    usages: list[MoEUsage | None]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Returns the folder of a plain model, of its copies with dequantised numbers, and of placements."""
    root = tmp_path_factory.mktemp("models")
    config = hf_tiny.hf_config(**SIZES)
    tensors = hf_tiny.write_checkpoint(root / "plain", config)
    for form, request in FORMS.items():
        coding = CODINGS[request["quantization"]]
        parts = (".experts.",) if "quantize" in request else ("_proj.", "lm_head.")
        coded = {
            name: dequantised(quantise(tensor, CODINGS["int8"] if name.startswith("lm_head") else coding))
            if any(part in name for part in parts)
            else tensor
            for name, tensor in tensors.items()
        }
        hf_tiny.write_checkpoint(root / form, config, tensors=coded)
    identity = model_identity(load_model(root / "plain", make_mesh()))
    for ranks in (2, 4, 8):
        _random_placement(ranks, identity).save(root / f"placement{ranks}.npz")
    return root


def _random_placement(ranks: int, identity: str) -> Placement:
    """Returns experts anywhere, and guesses that have nothing to do with them."""
    rng = np.random.default_rng(7)

    def shares(count: int) -> tuple[np.ndarray, ...]:
        share = rng.dirichlet(np.ones(ranks), (LAYERS, count)).astype(np.float16)
        return share.argmax(-1).astype(np.int16), share.max(-1), share

    rows = rng.permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1)
    return Placement(rows, ranks, identity, Tables(*shares(VOCAB), *shares(ranks * ranks)))


@pytest.fixture(scope="module")
def ran(models: Path) -> Iterator[Callable[[Case], Run]]:
    """Returns what an engine did; each runs once."""
    known: dict[Case, Run] = {}

    def run(case: Case) -> Run:
        if case not in known:
            with closing(_engine(models, case)) as engine:
                known[case] = _serve(engine)
                if engine.runner.cache is not None:
                    check_pool(engine, EXPERTS)
                    _check_bytes(engine, case)
        return known[case]

    yield run
    jax.clear_caches()


def _engine(models: Path, case: Case) -> Engine:
    data, expert, tensor = case.shape
    letters = {
        "b": {"binning": BINNING},
        "c": {"capacity": CAPACITY},
        "s": {"shuffle": ShuffleConfig(str(models / f"placement{expert}.npz"), history=True)},
        "o": {"offload": OffloadConfig(memory=_memory(case))},
    }
    moe = MoEConfig(transport="ragged_all_to_all" if expert > 1 else "replicated")
    for letter in case.techniques:
        moe = replace(moe, **letters[letter])
    form = {} if case.is_plain else FORMS[case.form]
    settings = replace(
        SETTINGS, moe=moe, attention="tp" if expert > 1 else "dp", data_parallel_size=data,
        expert_parallel_size=expert, tensor_parallel_size=tensor, **form,
    )  # fmt: skip
    return build_engine(models / (case.form if case.is_plain else "plain"), settings, warm_up=False)


def _memory(case: Case) -> int:
    """Returns bytes of a device: for a quarter of its experts or those of a token, three more, and half."""
    one, held = _expert_bytes(case), EXPERTS // case.shape[1]
    return (max(min(2, held), LAYERS * held // 4) + 3) * one + one // 2


def _expert_bytes(case: Case) -> int:
    """Returns the bytes of a device's part of an expert: three matrices, and the scales of their rows."""
    inner = INNER // case.shape[2]
    if case.is_plain:
        return 4 * 3 * HIDDEN * inner
    if case.form == "int8":  # a scale of a whole row is on every rank
        return 3 * HIDDEN * inner + 4 * (2 * inner + HIDDEN)
    groups = 2 * inner + HIDDEN * max(1, inner // 32)  # rows of 32; a cut group has its own scale and low
    return 3 * HIDDEN * inner // 2 + 4 * groups


def _serve(engine: Engine) -> Run:
    rng = np.random.default_rng(0)
    outputs: list[list] = [[] for _ in range(COUNT)]
    requests = [
        Request(
            str(i),
            rng.integers(0, VOCAB, int(rng.integers(1, 20))).tolist(),
            replace(GREEDY, exact=i in EXACT),
            outputs[i].append,
            0.0,
        )
        for i in range(COUNT)
    ]
    engine.run(requests)
    stats = engine.moe_stats()
    both = stats["prefill"], stats["decode"]
    changed = tuple(sum(part[name] for part in both) for name in ("remapped", "rerouted", "dropped"))
    assert all(part["lost_assignments"] == 0 for part in both)
    return Run(
        [r.token_ids for r in requests],
        np.add(*(part["counts"] for part in both)).tolist(),
        changed,
        stats["decode"]["expert_cache_misses"],
        [parts[-1].moe for parts in outputs],
    )


def _check_bytes(engine: Engine, case: Case) -> None:
    """Checks that a budget of bytes holds as many experts of this form as fit."""
    cache = engine.runner.cache
    assert cache is not None and isinstance(cache.pool.down_EDF, Quantised) != case.is_plain
    parts = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(cache.pool)]
    slots = len(parts[0])  # one of them is read by no layer, and two more experts are on their way
    assert sum(part.nbytes for part in parts) == slots * _expert_bytes(case)
    assert slots + 2 == _memory(case) // _expert_bytes(case)


def cases(*rows: tuple[str, Shape, str], always: tuple[str, Shape, str] | None = None) -> list[Any]:
    """Returns the parameters of a test, of which one may always run."""
    known = [pytest.param(Case(*row), id=_name(row), marks=pytest.mark.matrix) for row in rows]
    return known if always is None else [pytest.param(Case(*always), id=_name(always)), *known]


def _name(row: tuple[str, Shape, str]) -> str:
    return f"{row[0]} {'x'.join(map(str, row[1]))} {row[2]}"


@pytest.mark.parametrize(
    "case",
    cases(
        ("int8", EIGHT, "so"), ("int8", PAIRS, "s"), ("int8", CUBE, "o"), ("int8", SLICES, "o"),
        ("int4", EIGHT, "o"), ("int4", PAIRS, "so"), ("int4", SLICES, "o"), ("int4", CUBE, "s"),
        ("int4 in all", EIGHT, "so"), ("int4 in all", PAIRS, "o"), ("int4 in all", SLICES, "o"),
        always=("int4 in all", CUBE, "so"),
    ),
)  # fmt: skip
def test_what_is_lossless_gives_the_tokens_of_one_device(ran, case: Case):
    ours, alone = ran(case), ran(Case(case.form, ALONE))
    assert ours.tokens == alone.tokens and ours.counts == alone.counts
    assert (ours.misses > 0) == ("o" in case.techniques)


@pytest.mark.parametrize(
    "case",
    cases(
        ("int8", CUBE, "c"), ("int8", SLICES, "bco"), ("int8", EIGHT, "bcso"),
        ("int4", PAIRS, "b"), ("int4", CUBE, "bcso"),
        ("int4 in all", CUBE, "b"), ("int4 in all", EIGHT, "c"), ("int4 in all", PAIRS, "bcso"),
        ("int4 in all", SLICES, "bco"), ("int8", PAIRS, "bc"),
    ),
)  # fmt: skip
def test_what_is_lossy_changes_what_it_changes_of_the_plain_numbers(ran, case: Case):
    ours, plain, alone = ran(case), ran(case._replace(is_plain=True)), ran(Case(case.form, ALONE))
    assert (ours.tokens, ours.counts, ours.changed) == (plain.tokens, plain.counts, plain.changed)
    assert ours.usages == plain.usages
    assert [ours.tokens[i] for i in EXACT] == [alone.tokens[i] for i in EXACT]
    assert (ours.changed[0] > 0) == ("b" in case.techniques)
    assert (ours.changed[1] > 0) == ("c" in case.techniques)
