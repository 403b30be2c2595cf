"""Tests the TPU kernels with quantised weights in Pallas' interpreters against float64 numpy."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jmoe_kernels.grouped_mlp import pick
from jmoe_kernels.grouped_mlp.pallas_tpu import BlockSizes, grouped_mlp_pallas_tpu, limit
from jmoe_kernels.grouped_mlp.pallas_tpu.codes import joined, row_scales, split_rows, terms_of
from jmoe_kernels.grouped_mlp.types import ExpertWeights
from jmoe_kernels.quantised import Coding, Quantised
from support.quantised_kernels import exact, on_device, poisoned, random_weight

EXPERTS, MODEL, INNER, ROWS, SIZES = 4, 128, 256, 64, (17, 0, 33, 3)
BLOCKS = {
    "decode": BlockSizes("decode", 128, (32, 16), ROWS, buffers=3),
    "decode on two cores": BlockSizes("decode", 128, (32, 32), ROWS, buffers=2, cores=2),
    "prefill": BlockSizes("prefill", 128, (32, 16), 32),
}
# gate and up, down
CODINGS = {
    "int8 rows": (Coding("int8", None), Coding("int8", None)),
    "int8 g32 and g128": (Coding("int8", 32), Coding("int8", 128, "bfloat16")),
    "int4 g128": (Coding("int4", 128), Coding("int4", 128)),
    "int4 g32 with lows": (Coding("int4", 32, "float16", has_lows=True),) * 2,
    "mxfp4": (Coding("e2m1", 32, "uint8"),) * 2,
    "iq4 and int4 rows": (Coding("iq4", 32, "float16"), Coding("int4", None)),
    "e4m3 rows and g128": (Coding("e4m3", None), Coding("e4m3", 128)),
}
# largest error against the root mean square of all outputs: the largest of 6784 sums, of three products
ERRORS = {"auto": 2e-3, "int8": 0.3, "e4m3": 4e-2}


def make(name: str, seed: int = 0) -> tuple[Quantised, Quantised]:
    gate_up, down = CODINGS[name]
    return (
        random_weight(gate_up, (EXPERTS, 2, INNER, MODEL), seed),
        random_weight(down, (EXPERTS, MODEL, INNER), seed + 1),
    )


def silu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate / (1 + np.exp(-gate)) * up


def swiglu_oai(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


def by_numpy(x, gate_up, down, biases=None, act=silu) -> np.ndarray:
    """Runs each expert's rows in float64; rows past the last group are zero."""
    y, start = np.zeros(x.shape), 0
    numbers, wide = (exact(gate_up), exact(down)), x.astype(np.float64)
    up_bias, down_bias = (
        (np.zeros((EXPERTS, 2, INNER)), np.zeros((EXPERTS, MODEL))) if biases is None else biases
    )
    for e, n in enumerate(SIZES):
        rows = wide[start : start + n]
        gate, up = (rows @ numbers[0][e, i].T + up_bias[e, i] for i in (0, 1))
        y[start : start + n] = act(gate, up) @ numbers[1][e].T + down_bias[e]
        start += n
    return y


def stored(weights: tuple[Quantised, Quantised]) -> list[Quantised]:
    """Returns weights on a device in the kernels' layout; those of experts without rows are poison."""
    return [on_device(poisoned(weight, SIZES).in_layout("columns")) for weight in weights]


@partial(jax.jit, static_argnames=("blocks", "activation", "activations", "interpret"))
def run(x, weights, sizes, *biases, interpret=True, **settings) -> jax.Array:
    return grouped_mlp_pallas_tpu(x, ExpertWeights(*weights, *biases), sizes, interpret=interpret, **settings)


def check(y: jax.Array, want: np.ndarray, bound: float) -> None:
    used, got = sum(SIZES), np.asarray(y, np.float64)
    error = np.abs(got[:used] - want[:used]).max() / np.sqrt(np.mean(want[:used] ** 2))
    assert error < bound, f"{error} of the outputs' size, {bound} is allowed"
    assert not got[used:].any(), "rows past the last group are exactly zero"


def rows_of_x(seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((ROWS, MODEL), np.float32)
    x[sum(SIZES) :] = np.nan
    return x


@pytest.mark.parametrize("name", CODINGS)
def test_every_coding_equals_float64(name: str):
    weights, x = make(name), rows_of_x()
    bound = ERRORS["e4m3" if name.startswith("e4m3") else "auto"]
    for blocks in ("decode", "prefill"):
        y = run(x, stored(weights), np.asarray(SIZES, np.int32), blocks=BLOCKS[blocks])
        check(y, by_numpy(np.nan_to_num(x), *weights), bound)


@pytest.mark.parametrize("blocks", ["decode on two cores", "prefill"])
def test_biases_and_activations_of_one_term(blocks: str):
    weights, x, rng = make("mxfp4"), rows_of_x(), np.random.default_rng(3)
    biases = (
        rng.standard_normal((EXPERTS, 2, INNER), np.float32),
        rng.standard_normal((EXPERTS, MODEL), np.float32),
    )
    for activations in ("auto", "int8"):
        sizes = replace(BLOCKS[blocks], windows=(32, 32))
        settings = {"blocks": sizes, "activation": "swiglu_oai", "activations": activations}
        y = run(x, stored(weights), np.asarray(SIZES, np.int32), *biases, **settings)
        check(y, by_numpy(np.nan_to_num(x), *weights, biases, swiglu_oai), ERRORS[activations])


@pytest.mark.parametrize(
    ("name", "blocks"), [("int4 g32 with lows", "decode"), ("int8 g32 and g128", "prefill")]
)
def test_no_race_and_no_uninitialized_memory(name: str, blocks: str):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # jax has no public name for this

    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait", num_cores_or_threads=1
    )
    weights, x = make(name), rows_of_x()
    y = run(x, stored(weights), np.asarray(SIZES, np.int32), blocks=BLOCKS[blocks], interpret=params)
    check(y, by_numpy(np.nan_to_num(x), *weights), ERRORS["auto"])
    assert not interpret_pallas_call.races.races_found


def test_a_bad_row_stays_in_its_row():
    weights, x = make("int8 rows"), rows_of_x()
    want = by_numpy(np.nan_to_num(x), *weights)
    x[[0, 16, 20, 49]] = np.nan, np.inf, -np.inf, *[1] * (MODEL - 3)
    y = np.array(run(x, stored(weights), np.asarray(SIZES, np.int32), blocks=BLOCKS["decode"]))
    assert not np.isfinite(y[[0, 16, 20, 49]]).any(axis=1).any()
    want[[0, 16, 20, 49]] = y[[0, 16, 20, 49]] = 0
    check(jnp.asarray(y), want, ERRORS["auto"])


@pytest.mark.parametrize(
    ("dtype", "terms", "bits"), [("int8", 2, 15), ("int8", 1, 7), ("float8_e4m3fn", 2, 8)]
)
def test_terms_are_the_row_to_their_bits(dtype: str, terms: int, bits: int):
    x = np.random.default_rng(0).standard_normal((64, 256), np.float32) * np.logspace(-6, 6, 64)[:, None]
    x = x.astype(np.float32)
    x[5] = 0
    rows = split_rows(jnp.asarray(x), jnp.dtype(dtype), terms, 4)
    units = jnp.asarray(rows["x"], jnp.int32 if dtype == "int8" else jnp.float32)
    got = np.asarray(joined(units, terms, 256)) * np.asarray(rows["scales"])[:, :1]
    peak = np.abs(x).max(axis=1, keepdims=True)
    step = peak if dtype == "int8" else np.maximum(np.abs(x), peak * 2.0**-12)
    assert np.all(np.abs(got - x) <= step * 2.0**-bits)
    assert np.all(np.abs(rows["sums"][:, :4] - x.reshape(64, 4, 64).sum(2)) <= peak * 1e-4)


def test_the_largest_sums_do_not_overflow():
    for depth in (512, 8192):
        x = np.full((16, depth), -3.0, np.float32)
        _, factor = row_scales(x, jnp.int8, 2)
        high, low = terms_of(jnp.asarray(x), factor, jnp.int8, 2)
        codes = np.full((depth, 128), -128, np.int64)
        product = np.concatenate([np.asarray(part, np.int64) @ codes for part in (high, low)])
        assert np.abs(product).max() < 2**31
        got = np.asarray(joined(jnp.asarray(product, jnp.int32), 2, depth))
        np.testing.assert_allclose(got, 127 * 256 * 128.0 * depth, rtol=1e-6)


def shapes(*codings: Coding | None, layout="columns", inner: int = INNER) -> ExpertWeights:
    sizes = (EXPERTS, 2, inner, MODEL), (EXPERTS, MODEL, inner)
    return ExpertWeights(
        *(
            jax.ShapeDtypeStruct(size, jnp.bfloat16) if c is None else c.shapes(size, "bfloat16", layout)
            for c, size in zip(codings, sizes, strict=True)
        )
    )


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (shapes(Coding("e2m1", 16), Coding("e2m1", 16)), "groups of 16.*take whole groups of 32, 64 or 128"),
        (shapes(Coding("int8", None), None), "one of gate_up and down is quantised"),
        (shapes(Coding("int8", None), Coding("e4m3", None)), "take e4m3 for both or neither"),
        (shapes(Coding("int8", None), Coding("int8", None), layout="rows"), "lie in the layout 'rows'"),
        (shapes(Coding("int8", 128), Coding("int8", 128), inner=192), "groups of 128.*take whole groups"),
        (shapes(Coding("int8", 32), Coding("int8", 32), inner=192), "inner dimension 192 is not a multiple"),
    ],
)
def test_refusals_name_the_limit(weights: ExpertWeights, reason: str):
    assert re.search(reason, limit(weights, 64, "silu") or "no reason")


def test_a_tpu_runs_the_codings_that_its_kernels_take():
    dims = (8, 256, 512)
    for both in CODINGS.values():
        assert pick("tpu", jnp.bfloat16, dims, [both])[0] == "pallas_tpu"
    name, why = pick("tpu", jnp.bfloat16, dims, [(Coding("e2m1", 16), Coding("e2m1", 16))])
    assert name == "xla" and "groups of 16" in why
