"""Tests the Hopper grouped MLP in the Mosaic GPU interpreter, against numpy on bfloat16 inputs.

The interpreter compiles every thread of the prefill kernels anew at each call (about ten seconds), so each of
their few calls covers several promises; the decode kernels take about two seconds.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jmoe_kernels.grouped_mlp.cases import empty_patterns
from jmoe_kernels.grouped_mlp.pallas_gpu import BlockSizes, grouped_mlp_pallas_gpu, limit
from jmoe_kernels.grouped_mlp.pallas_gpu.blocks import (
    ALIGN,
    EXPERT,
    ROW,
    ROWS,
    SKIP,
    SMEM_LIMIT,
    TABLE,
    bucket,
    choose_blocks,
    fit_blocks,
    window_count,
    windows,
)
from jmoe_kernels.grouped_mlp.types import ExpertWeights, gated
from support.aot.gpu import gpu_interpreter

DECODE = BlockSizes("decode", 16, 64, 64, 64, 64, 2, 2)
PREFILL = BlockSizes("prefill", 128, 64, 64, 64, 64, 2, 2, sms=2)
INNER, MODEL = 64, 128


def rounded(a) -> np.ndarray:
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)


def make(sizes: tuple[int, ...], rows: int, biased: bool, seed: int = 0) -> tuple:
    """Returns (x, gate_up, down, gate_up bias, down bias): bfloat16 numbers in float32."""
    rng, e = np.random.default_rng(seed), len(sizes)
    shapes = (rows, MODEL), (e, 2, INNER, MODEL), (e, MODEL, INNER), (e, 2, INNER), (e, MODEL)
    scales = (1, MODEL**-0.5, INNER**-0.5, float(biased), float(biased))
    return tuple(rounded(rng.standard_normal(s) * c) for s, c in zip(shapes, scales, strict=True))


def by_numpy(arrays: tuple, sizes: tuple[int, ...], activation: str) -> np.ndarray:
    x, gate_up, down, gate_up_bias, down_bias = arrays
    y, start = np.zeros_like(x), 0
    for e, n in enumerate(sizes):
        rows = x[start : start + n]
        gate, up = (rows @ gate_up[e, i].T + gate_up_bias[e, i] for i in (0, 1))
        y[start : start + n] = rounded(gated(activation, gate, up)) @ down[e].T + down_bias[e]
        start += n
    return y


def run(
    arrays: tuple, sizes: tuple[int, ...], blocks: BlockSizes, activation="silu", races=False
) -> np.ndarray:
    x, *rest = (jnp.asarray(a, jnp.bfloat16) for a in arrays)
    biased = np.any(arrays[3])
    weights = ExpertWeights(*(rest if biased else rest[:2]))
    with gpu_interpreter(**({"detect_races": True} if races else {})) as callbacks:
        call = jax.jit(
            lambda *a: grouped_mlp_pallas_gpu(*a, activation=activation, interpret=True, blocks=blocks)
        )
        y = np.array(call(x, weights, jnp.asarray(sizes, jnp.int32)))
        assert not races or not callbacks.get_races().races_found
    assert y.dtype == np.float32
    return y


def check(sizes, rows, blocks, activation="silu", biased=False, poison_row=None, races=False) -> None:
    """Asserts that one call matches numpy, with NaN wherever nothing may be read or nothing may spread."""
    arrays = make(sizes, rows, biased)
    want = by_numpy(arrays, sizes, activation)
    x, gate_up, down, *_ = arrays
    x[sum(sizes) :] = np.nan
    for e in np.flatnonzero(np.asarray(sizes) == 0):
        gate_up[e] = down[e] = np.nan
    if poison_row is not None:
        x[poison_row, :2] = np.nan, np.inf
    got = run(arrays, sizes, blocks, activation, races)
    if poison_row is not None:
        assert np.isnan(got[poison_row]).all()
        got[poison_row] = want[poison_row]
    # One unit of bfloat16 in an h of about 1, times a weight: float32 sums may straddle a rounding.
    np.testing.assert_allclose(got, want, atol=4e-3)
    assert not got[sum(sizes) :].any(), "rows past the last group are zero"


@pytest.mark.matrix
def test_decode_every_pattern_of_empty_groups():
    for sizes in empty_patterns(experts=3, rows_each=1):
        check(sizes, 8, DECODE)


def test_decode_one_hot_group_over_several_windows():
    check((0, 37, 0), 50, DECODE)


def test_decode_groups_that_start_and_end_anywhere():
    check((13, 9, 21), 43, dataclasses.replace(DECODE, rows=32), races=True)


def test_decode_bias_and_clamped_activation_and_a_poisoned_row():
    check((3, 0, 5), 11, DECODE, activation="swiglu_oai", biased=True, poison_row=4, races=True)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_decode_activations(activation: str):
    check((2, 1, 0), 3, DECODE, activation=activation)


@pytest.mark.matrix
def test_prefill_groups_across_windows_and_a_poisoned_row():
    check((133, 0, 61), 203, PREFILL, poison_row=130, races=True)


@pytest.mark.matrix
def test_prefill_bias_and_clamped_activation():
    check((5, 150, 0), 155, PREFILL, activation="swiglu_oai", biased=True)


@pytest.mark.matrix
def test_prefill_zero_rows():
    check((0, 0, 0), 9, PREFILL)


# ---- the map from windows to experts, without a kernel


def group_sizes(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, int]]:
    for experts in (1, 3, 17):
        for _ in range(3):
            sizes = rng.integers(0, 60, experts) * rng.integers(0, 2, experts)
            yield sizes, max(128, -(-(int(sizes.sum()) + int(rng.integers(0, 40))) // ALIGN) * ALIGN)


@pytest.mark.matrix
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("tile", [16, 32, 128])
def test_windows_cover_every_row_once_and_stay_inside(tile: int, compact: bool):
    for sizes, rows in group_sizes(np.random.default_rng(0)):
        table, place = map(np.asarray, windows(jnp.asarray(sizes, jnp.int32), rows, tile, compact))
        assert table.shape == (window_count(rows, len(sizes), tile), 4)
        used = table[table[:, EXPERT] >= 0]
        assert (used[:, ROW] % ALIGN == 0).all() and (used[:, ROW] + tile <= rows).all()
        owner = np.full(rows, -1)
        for e, row, skip, own in used[:, [EXPERT, ROW, SKIP, ROWS]]:
            assert skip + own <= tile and (owner[row + skip : row + skip + own] == -1).all()
            owner[row + skip : row + skip + own] = e
        want = np.repeat(np.arange(len(sizes) + 1), [*sizes, rows - sizes.sum()])
        np.testing.assert_array_equal(owner, want)
        np.testing.assert_array_equal(table[place[:, 0], ROW] + place[:, 1], np.arange(rows))
        np.testing.assert_array_equal(table[place[:, 0], EXPERT], want)
        if compact:
            assert (table[: len(used), EXPERT] >= 0).all()


# ---- what is refused, and the table


def weights_of(inner=64, model=64, dtype=jnp.bfloat16) -> ExpertWeights:
    return ExpertWeights(jnp.zeros((2, 2, inner, model), dtype), jnp.zeros((2, model, inner), dtype))


@pytest.mark.parametrize(
    ("weights", "activation", "reason"),
    [
        (weights_of(inner=96), "silu", "inner dimension must be a multiple of 64, got 96"),
        (weights_of(model=32), "silu", "model dimension must be a multiple of 64, got 32"),
        (weights_of(dtype=jnp.float32), "silu", "weights must be bfloat16, gate_up is float32"),
        (weights_of(dtype=jnp.uint16), "silu", "weights must be bfloat16, gate_up is uint16"),
        (weights_of(), "tanh", "activation 'tanh' is unknown; known: silu"),
    ],
)
def test_refuses_with_the_limit(weights: ExpertWeights, activation: str, reason: str):
    assert reason in limit(weights, 8, activation)
    x = jnp.zeros((8, weights.dims[2]), jnp.bfloat16)
    with pytest.raises(ValueError, match=reason):
        grouped_mlp_pallas_gpu(x, weights, jnp.zeros(2, jnp.int32), activation=activation)


def test_refuses_other_rows_and_too_large_blocks():
    sizes = jnp.zeros(2, jnp.int32)
    assert limit(weights_of(), 8, "silu") is None
    with pytest.raises(ValueError, match="x must be bfloat16, got float32"):
        grouped_mlp_pallas_gpu(jnp.zeros((8, 64)), weights_of(), sizes)
    large = dataclasses.replace(DECODE, rows=64, inner=256, stages_up=8)
    with pytest.raises(ValueError, match=f"bytes of shared memory, the limit is {SMEM_LIMIT}"):
        weights = weights_of(inner=256, model=512)
        grouped_mlp_pallas_gpu(jnp.zeros((8, 512), jnp.bfloat16), weights, sizes, blocks=large)


@pytest.mark.parametrize("device", [device for device, _ in TABLE])
def test_table_fits_shared_memory_at_every_model_size(device: str):
    for experts, inner, model in ((128, 768, 2048), (64, 1024, 2048), (8, 14336, 4096), (64, 1408, 2048)):
        for rows in (experts, 8 * experts, 40 * experts, 512 * experts):
            blocks = fit_blocks(choose_blocks(rows, experts, device), inner, model)
            assert blocks.kernel == ("prefill" if bucket(rows, experts) == "prefill" else "decode")
            assert max(blocks.smem()) <= SMEM_LIMIT and inner % blocks.inner == 0 == model % blocks.model
