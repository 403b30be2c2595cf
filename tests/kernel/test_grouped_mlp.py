"""Tests every implementation of grouped_mlp on every named case, against the oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jmoe_kernels import cpu
from jmoe_kernels.grouped_mlp import ExpertWeights, grouped_mlp, storage_dtype
from jmoe_kernels.grouped_mlp.cases import CASES, Case, empty_patterns, make_inputs
from jmoe_kernels.grouped_mlp.reference import grouped_mlp_reference
from support import cpu_kernels

NO_CPU = cpu.why_missing()
needs_cpu = pytest.mark.skipif(NO_CPU is not None, reason=f"no C++ kernels here: {NO_CPU}")
IMPLEMENTATIONS = ("xla", "batched", pytest.param("cpu", marks=needs_cpu))
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@partial(jax.jit, static_argnames=("implementation", "max_rows", "activation"))
def run(x, gate_up, down, sizes, gate_up_bias=None, down_bias=None, **options):
    return grouped_mlp(x, ExpertWeights(gate_up, down, gate_up_bias, down_bias), sizes, **options)


def by_numpy(x, gate_up, down, sizes):
    """Computes what the oracle must give, in plain numpy over each expert's rows."""
    e, _, f, d = gate_up.shape
    none = [np.zeros((e, 2, f), np.float32), np.zeros((e, d), np.float32)]
    return cpu_kernels.mlp(x, (gate_up, down, *none), sizes, "silu")


def in_bfloat16(inputs):
    x, gate_up, down, sizes = inputs
    as_stored = [
        jnp.asarray(w, jnp.bfloat16).view(storage_dtype(jnp.dtype(jnp.bfloat16))) for w in (gate_up, down)
    ]
    return jnp.asarray(x, jnp.bfloat16), *as_stored, sizes


@by_case
def test_reference_is_numpy(case: Case):
    x, gate_up, down, sizes = inputs = make_inputs(case)
    got = grouped_mlp_reference(jnp.asarray(x), ExpertWeights(*map(jnp.asarray, (gate_up, down))), sizes)
    np.testing.assert_allclose(got, by_numpy(*inputs), atol=2e-5)


@every
@by_case
def test_float32(case: Case, implementation: str):
    inputs = make_inputs(case)
    y = run(*inputs, implementation=implementation)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, by_numpy(*inputs), atol=2e-5)
    assert not np.any(np.asarray(y)[sum(case.sizes) :]), "rows past the last group are zero"


@every
@by_case
def test_bfloat16(case: Case, implementation: str):
    inputs = make_inputs(case)
    y = run(*in_bfloat16(inputs), implementation=implementation)
    assert y.dtype == jnp.float32
    rounded = [cpu_kernels.rounded(a) for a in inputs[:3]]
    np.testing.assert_allclose(y, by_numpy(*rounded, inputs[3]), atol=0.06)


@every
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu", "swiglu_oai"])
def test_activations_and_biases(activation: str, implementation: str):
    case = Case("biases", 30, (9, 0, 14, 4))
    x, gate_up, down, sizes = make_inputs(case)
    rng = np.random.default_rng(1)
    biases = rng.standard_normal((4, 2, 16), np.float32), rng.standard_normal((4, 32), np.float32)
    y = run(x, gate_up * 4, down, sizes, *biases, activation=activation, implementation=implementation)
    want = cpu_kernels.mlp(x, (gate_up * 4, down, *biases), sizes, activation)
    np.testing.assert_allclose(y, np.where(np.arange(30)[:, None] < 27, want, 0), atol=1e-4)


@every
def test_every_pattern_of_empty_groups(implementation: str):
    for sizes in empty_patterns(experts=8, rows_each=2):
        inputs = make_inputs(Case("pattern", 48, sizes, model=16, inner=8))
        np.testing.assert_allclose(run(*inputs, implementation=implementation), by_numpy(*inputs), atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("cpu", marks=needs_cpu)])
def test_weights_of_experts_without_rows_are_never_read(implementation: str):
    x, gate_up, down, sizes = make_inputs(Case("poisoned", 20, (7, 0, 0, 9, 0)))
    want = by_numpy(x, gate_up, down, sizes)
    for e in np.flatnonzero(sizes == 0):
        gate_up[e] = down[e] = np.nan
    got = run(x, gate_up, down, sizes, implementation=implementation)
    np.testing.assert_allclose(got, want, atol=2e-5)


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_stays_alone(bad: float, implementation: str):
    case = Case("bad rows", 44, (20, 3, 17))
    inputs = make_inputs(case)
    want = by_numpy(*inputs)
    wrong = [0, 21, 39, 42]  # in each group, and past the last
    inputs[0][wrong, 5] = bad
    y = np.asarray(run(*inputs, implementation=implementation))
    good = np.setdiff1d(np.arange(40), wrong)
    np.testing.assert_allclose(y[good], want[good], atol=2e-5)
    assert not np.any(np.isfinite(y[wrong[:3]]).all(-1)) and not y[40:].any()


@every
def test_gradient_equals_that_of_the_oracle(implementation: str):
    x, gate_up, down, sizes = map(jnp.asarray, make_inputs(Case("gradient", 30, (9, 0, 14, 4))))

    def loss(x, gate_up, down, f):
        return jnp.sum(jnp.sin(f(x, ExpertWeights(gate_up, down), sizes)))

    want = jax.grad(lambda *a: loss(*a, grouped_mlp_reference), (0, 1, 2))(x, gate_up, down)
    named = partial(grouped_mlp, implementation=implementation)
    got = jax.grad(lambda *a: loss(*a, named), (0, 1, 2))(x, gate_up, down)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-4)


def test_max_rows_zeroes_exactly_the_rows_beyond_it():
    case = Case("max_rows", 30, (9, 0, 14, 4))
    inputs = make_inputs(case)
    y = run(*inputs, implementation="batched", max_rows=6)
    rank = np.concatenate([np.arange(n) for n in case.sizes] + [np.zeros(3, int)])
    want = np.where((rank < 6)[:, None], by_numpy(*inputs), 0)
    np.testing.assert_allclose(y, want, atol=2e-5)


def test_named_implementations_refuse_with_the_reason():
    inputs = make_inputs(CASES[0])
    with pytest.raises(ValueError, match=r"'triton' is unknown; known: xla, pallas_tpu"):
        run(*inputs, implementation="triton")
    with pytest.raises(ValueError, match="max_rows is for implementation 'batched'"):
        run(*inputs, implementation="xla", max_rows=4)
    with pytest.raises(ValueError, match=r"group_sizes must be \[4\], got \[3\]"):
        run(*inputs[:3], np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"down must be \[4, 32, 16\], got \[4, 32, 15\]"):
        run(*inputs[:2], inputs[2][..., 1:], inputs[3])
    with pytest.raises(ValueError, match="activation 'tanh' is unknown; known: silu, gelu_tanh"):
        run(*inputs, activation="tanh")
    with pytest.raises(ValueError, match="dtype float16 is not supported"):
        run(inputs[0], *(w.astype(np.float16) for w in inputs[1:3]), inputs[3])


@needs_cpu
def test_sizes_that_claim_too_many_rows_read_nothing_out_of_bounds():
    x, gate_up, down, _ = make_inputs(CASES[0])
    sizes = np.array([40, 40, -3, 2**30], np.int32)
    want = by_numpy(x, gate_up, down, (40, 24, 0, 0))
    np.testing.assert_allclose(run(x, gate_up, down, sizes, implementation="cpu"), want, atol=2e-5)
