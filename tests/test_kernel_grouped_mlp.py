"""The contract of grouped_mlp: every implementation on every named case, against the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jmoe_kernels.grouped_mlp import grouped_mlp, storage_dtype
from jmoe_kernels.grouped_mlp.cases import CASES, Case, empty_patterns, make_inputs
from jmoe_kernels.grouped_mlp.reference import grouped_mlp_reference

IMPLEMENTATIONS = ("xla", "batched")
run = jax.jit(grouped_mlp, static_argnames=("implementation", "capacity"))


def by_numpy(x, gate_up, down, sizes):
    """The oracle's oracle: plain numpy over each expert's rows."""
    y, start = np.zeros_like(x), 0
    for e, n in enumerate(sizes):
        rows = x[start : start + n]
        gate, up = rows @ gate_up[e, 0].T, rows @ gate_up[e, 1].T
        y[start : start + n] = (gate / (1 + np.exp(-gate)) * up) @ down[e].T
        start += n
    return y


def in_bfloat16(inputs):
    x, gate_up, down, sizes = inputs
    as_stored = [
        jnp.asarray(w, jnp.bfloat16).view(storage_dtype(jnp.dtype(jnp.bfloat16))) for w in (gate_up, down)
    ]
    return jnp.asarray(x, jnp.bfloat16), *as_stored, sizes


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_reference_is_numpy(case: Case):
    inputs = make_inputs(case)
    np.testing.assert_allclose(grouped_mlp_reference(*map(jnp.asarray, inputs)), by_numpy(*inputs), atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float32(case: Case, implementation: str):
    inputs = make_inputs(case)
    y = run(*inputs, implementation=implementation)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, by_numpy(*inputs), atol=2e-5)
    assert not np.any(np.asarray(y)[sum(case.sizes) :]), "rows past the last group are zero"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bfloat16(case: Case, implementation: str):
    inputs = make_inputs(case)
    y = run(*in_bfloat16(inputs), implementation=implementation)
    assert y.dtype == jnp.float32
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in inputs[:3]]
    np.testing.assert_allclose(y, by_numpy(*rounded, inputs[3]), atol=0.06)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_pattern_of_empty_groups(implementation: str):
    for sizes in empty_patterns(experts=5, rows_each=2):
        inputs = make_inputs(Case("pattern", 24, sizes))
        np.testing.assert_allclose(run(*inputs, implementation=implementation), by_numpy(*inputs), atol=2e-5)


def test_weights_of_experts_without_rows_are_never_read():
    x, gate_up, down, sizes = make_inputs(Case("poisoned", 20, (7, 0, 0, 9, 0)))
    want = by_numpy(x, gate_up, down, sizes)
    for e in np.flatnonzero(sizes == 0):
        gate_up[e] = down[e] = np.nan
    np.testing.assert_allclose(run(x, gate_up, down, sizes, implementation="xla"), want, atol=2e-5)


def test_gradient_of_batched_equals_that_of_the_oracle():
    x, gate_up, down, sizes = map(jnp.asarray, make_inputs(Case("gradient", 30, (9, 0, 14, 4))))

    def loss(x, gate_up, down, f):
        return jnp.sum(jnp.sin(f(x, gate_up, down, sizes)))

    want = jax.grad(lambda *a: loss(*a, grouped_mlp_reference), (0, 1, 2))(x, gate_up, down)
    batched = lambda *a: grouped_mlp(*a, implementation="batched")  # noqa: E731
    got = jax.grad(lambda *a: loss(*a, batched), (0, 1, 2))(x, gate_up, down)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-4)


def test_capacity_zeroes_exactly_the_rows_beyond_it():
    case = Case("capacity", 30, (9, 0, 14, 4))
    inputs = make_inputs(case)
    y = run(*inputs, implementation="batched", capacity=6)
    rank = np.concatenate([np.arange(n) for n in case.sizes] + [np.zeros(3, int)])
    want = np.where((rank < 6)[:, None], by_numpy(*inputs), 0)
    np.testing.assert_allclose(y, want, atol=2e-5)


def test_named_implementations_refuse_with_the_reason():
    inputs = make_inputs(dataclasses.replace(CASES[0]))
    with pytest.raises(ValueError, match=r"'pallas' is unknown; known: xla, batched"):
        grouped_mlp(*inputs, implementation="pallas")
    with pytest.raises(ValueError, match="capacity is for implementation 'batched'"):
        grouped_mlp(*inputs, implementation="xla", capacity=4)
    with pytest.raises(ValueError, match=r"group_sizes must be \[4\]"):
        grouped_mlp(*inputs[:3], np.zeros(3, np.int32))
