"""Tests the Hopper kernels with quantised weights in the Mosaic GPU interpreter, against float64 products.

jax 0.10's interpreter takes both factors of wgmma from shared memory only, so the numbers that a GPU decodes
into registers are decoded there too, and then stored. All other arithmetic is that of a GPU.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jmoe_kernels.grouped_mlp.pallas_gpu import BlockSizes, grouped_mlp_pallas_gpu, limit
from jmoe_kernels.grouped_mlp.pallas_gpu.blocks import SMEM_LIMIT, choose_blocks, fit_blocks
from jmoe_kernels.grouped_mlp.pallas_gpu.factor import Factor
from jmoe_kernels.grouped_mlp.types import ExpertWeights
from jmoe_kernels.quantised import Coding, LayoutName, Quantised
from jmoe_kernels.settings import Activations
from support.aot.gpu import gpu_interpreter
from support.quantised_kernels import exact, poisoned, random_weight

INNER, MODEL = 128, 192  # one step of 128 numbers, and three of 64
FEW = BlockSizes("decode", 16, 64, 64, 128, 128, 2, 2)
MANY = BlockSizes("decode", 64, 64, 64, 64, 64, 2, 2)
ERROR = 0.05  # of the outputs' root mean square: h, and numbers that are scaled early, round to bfloat16


@dataclass(frozen=True)
class Case:
    """One call: how both weights are stored, sizes of blocks and groups, and the rows' rounding."""

    gate_up: Coding
    down: Coding
    blocks: BlockSizes = FEW
    sizes: tuple[int, ...] = (3, 0, 5)
    rows: int = 16
    activations: Activations = "auto"


WINDOWS = {"sizes": (70, 0, 9), "rows": 88}
CASES = (
    Case(Coding("int8", None), Coding("int8", 32, "float16")),
    Case(Coding("e2m1", 32, "uint8"), Coding("e4m3", 128)),
    Case(Coding("int4", 32, "bfloat16", has_lows=True), Coding("e2m1", 32, "uint8"), MANY, **WINDOWS),
    Case(Coding("int8", 32), Coding("int4", None), activations="int8"),
)
MORE = (
    Case(Coding("int4", None), Coding("int4", 128)),
    Case(Coding("int4", 16), Coding("iq4", 32, "float16")),
    Case(Coding("e4m3", None), Coding("int8", None, has_lows=True)),
    Case(Coding("int8", 64), Coding("int4", None), MANY, **WINDOWS),
    Case(Coding("e4m3", 128), Coding("int8", 32), MANY, **WINDOWS),
    Case(Coding("int4", 64), Coding("iq4", 32), activations="int8"),
    Case(Coding("int8", None), Coding("int4", 128), MANY, **WINDOWS, activations="int8"),
)


def in_units(rows: np.ndarray, case: Case) -> np.ndarray:
    """Returns rows as the case's kernels multiply with them, in float64."""
    if case.activations == "auto":
        return rows
    units = np.abs(rows).max(axis=1, keepdims=True, initial=1e-30) / 127
    return np.round(rows / units) * units


def check(case: Case) -> None:
    """Asserts that one call matches float64, with scales of NaN for the experts without rows."""
    sizes, used, experts = case.sizes, sum(case.sizes), len(case.sizes)
    gate_up = random_weight(case.gate_up, (experts, 2, INNER, MODEL), 1)
    down = random_weight(case.down, (experts, MODEL, INNER), 2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((case.rows, MODEL)), jnp.bfloat16)
    wide, want, start = np.asarray(x, np.float64), np.zeros((case.rows, MODEL)), 0
    for e, n in enumerate(sizes):
        rows = slice(start, start + n)
        gate, up = (in_units(wide[rows], case) @ exact(gate_up[e])[i].T for i in (0, 1))
        want[rows] = in_units(gate / (1 + np.exp(-gate)) * up, case) @ exact(down[e]).T
        start += n
    both = [replace(poisoned(w, sizes).in_layout("tiles"), dtype="bfloat16") for w in (gate_up, down)]
    weights = ExpertWeights(*jax.tree.map(jnp.asarray, both))
    with gpu_interpreter():
        options = {"interpret": True, "blocks": case.blocks, "activations": case.activations}
        call = jax.jit(lambda *a: grouped_mlp_pallas_gpu(*a, **options))
        got = np.asarray(call(x.at[used:].set(jnp.nan), weights, jnp.asarray(sizes, jnp.int32)))
    assert not got[used:].any(), "rows past the last group are zero"
    np.testing.assert_allclose(got, want, rtol=0, atol=ERROR * np.sqrt(np.mean(want[:used] ** 2)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.gate_up}; {case.down}")
def test_matches_float64(case: Case):
    check(case)


@pytest.mark.matrix
@pytest.mark.parametrize("case", MORE, ids=lambda case: f"{case.gate_up}; {case.down}")
def test_matches_float64_in_more_forms(case: Case):
    check(case)


def test_rows_are_int8_where_codes_are():
    def has_int8_rows(coding: Coding, rows: int = 16) -> bool:
        return Factor(coding, 256, 128, rows, "int8").has_int8_rows

    assert all(map(has_int8_rows, (Coding("int8", None), Coding("int8", 32), Coding("int4", 64))))
    others = Coding("int4", 32), Coding("int8", 16), Coding("int8", 32, has_lows=True), Coding("e4m3", None)
    assert not any(map(has_int8_rows, others))
    assert has_int8_rows(Coding("int8", None), 128) and not has_int8_rows(Coding("int8", 32), 128)
    assert not Factor(Coding("int8", None), 256, 128, 16).has_int8_rows


def weights_of(coding: Coding, inner=64, model=128, layout: LayoutName = "tiles") -> ExpertWeights:
    gate_up = coding.shapes((2, 2, inner, model), "bfloat16", layout)
    return ExpertWeights(gate_up, coding.shapes((2, model, inner), "bfloat16", layout))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (
            weights_of(Coding("int8", 48)),
            "gate_up is quantised: groups of 48 numbers; the kernels",
        ),
        (weights_of(Coding("int4", 32), layout="rows"), "gate_up is quantised in the layout 'rows'"),
        (weights_of(Coding("int4", 32), inner=96, layout="rows"), "inner dimension must be a multiple of 64"),
        (weights_of(Coding("e2m1", 32, "uint8"), inner=2880, model=2880), None),
        (weights_of(Coding("e4m3", 128), inner=2048, model=7168), None),
        (weights_of(Coding("iq4", 32, "float16")), None),
    ],
)
def test_limits(weights: ExpertWeights, reason: str | None):
    found = limit(weights, 8, "silu")
    assert found is None if reason is None else reason in (found or "")


def test_steps_have_whole_groups_or_lie_in_one():
    for group in (None, 16, 32, 64, 128, 192, 256):
        for depth in (64, 192, 768, 2880, 7168):
            coding = Coding("int8", group)
            for rows in (1, 8, 40, 512):
                blocks = choose_blocks(rows, 1, "default", "codes")
                blocks = fit_blocks(blocks, depth, depth, (coding, coding))
                factor = Factor(coding, depth, blocks.k_up, blocks.rows)
                assert depth % factor.step == 0 == factor.step % factor.piece
                assert factor.group % factor.piece == 0, (group, depth, rows)
                assert max(blocks.smem()) <= SMEM_LIMIT


def test_scales_of_a_tile_lie_together():
    weight = random_weight(Coding("int8", 32), (2, 128, 96))
    packed: Quantised = weight.in_layout("tiles")
    tiles = packed.scales.reshape(2, 2, 3, 64)
    np.testing.assert_array_equal(tiles[1, 1, 2], weight.scales[1, 64:, 2])
