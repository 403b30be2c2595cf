"""Attention of a run of tokens to itself equals a plain numpy softmax, and so do its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jmoe_kernels.paged_attention import Span
from jmoe_kernels.paged_attention.reference import attention_reference

from jmoe.nn.uncached import attend_uncached

SPANS = (Span(), Span(window=5), Span(chunk=3), Span(chunk=64), Span(chunk=100))


def qkv(t: int, h: int = 4, g: int = 2, d: int = 8, e: int = 8):
    rng = np.random.default_rng(t)
    return (rng.standard_normal((2, t, *row), np.float32) for row in ((h, d), (g, d), (g, e)))


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("t", [1, 7, 130, pytest.param(300, marks=pytest.mark.matrix)])
def test_a_window_equals_numpy(t: int, span: Span):
    q, k, v = qkv(t)
    positions = jnp.broadcast_to(jnp.arange(t), (2, t))
    out = attend_uncached(q, k, v, positions, span)
    for b in range(2):
        np.testing.assert_allclose(out[b], attention_reference(q[b], k[b], v[b], span), atol=2e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(("sink", "heads"), [(1.0, (4, 2)), (1e4, (6, 1)), (-1e4, (3, 3))], ids=str)
def test_sinks_and_values_of_another_size(sink: float, heads: tuple[int, int]):
    """A sink that outweighs all keys leaves nothing; a sink without weight leaves all."""
    q, k, v = qkv(140, *heads, e=5)
    sinks = (sink * np.linspace(0.5, 1, heads[0])).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(140), (2, 140))
    out = attend_uncached(q, k, v, positions, Span(window=9), jnp.asarray(sinks))
    assert out.shape == (2, 140, heads[0], 5)
    for b in range(2):
        want = attention_reference(q[b], k[b], v[b], Span(window=9), sinks)
        np.testing.assert_allclose(out[b], want, atol=2e-5)
        plain = attention_reference(q[b], k[b], v[b], Span(window=9))
        assert np.allclose(want, 0) == (sink == 1e4) and np.allclose(want, plain) == (sink == -1e4)


def dense(q, k, v, span: Span, sinks):
    """Computes one softmax over all keys and the sink."""
    t, per = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a, per, axis=2) for a in (k, v))
    query, key = jnp.arange(t)[:, None], jnp.arange(t)[None]
    seen = (key <= query) & (query // (span.chunk or t) == key // (span.chunk or t))
    scores = jnp.where(seen, jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, -1e30)
    sink = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    share = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bhqk,bkhe->bqhe", share, v)


@pytest.mark.matrix
@pytest.mark.parametrize("span", [Span(), Span(chunk=50)], ids=str)
def test_gradients_equal_those_of_one_softmax(span: Span):
    q, k, v = map(jnp.asarray, qkv(135, e=6))
    sinks = jnp.array([0.3, -2.0, 5.0, 1.0])
    positions = jnp.broadcast_to(jnp.arange(135), (2, 135))
    probe = jnp.asarray(np.random.default_rng(0).standard_normal((2, 135, 4, 6), np.float32))
    ours = jax.grad(lambda *a: (attend_uncached(*a[:3], positions, span, a[3]) * probe).sum(), (0, 1, 2, 3))
    want = jax.grad(lambda *a: (dense(*a[:3], span, a[3]) * probe).sum(), (0, 1, 2, 3))
    for got, expected in zip(ours(q, k, v, sinks), want(q, k, v, sinks), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
        assert np.abs(expected).max() > 0.1


def test_padding_stays_finite_forward_and_backward():
    q, k, v = map(jnp.asarray, qkv(6))
    positions = jnp.array([[0, 1, 2, -1, -1, -1], [-1] * 6])
    loss = lambda q, sinks: jnp.sum(attend_uncached(q, k, v, positions, Span(chunk=2), sinks)[0, :3] ** 2)  # noqa: E731
    for sinks in (jnp.zeros(4), jnp.full(4, 1e4), jnp.full(4, -1e4)):
        assert np.isfinite(attend_uncached(q, k, v, positions, Span(chunk=2), sinks)).all()
        assert all(np.isfinite(grad).all() for grad in jax.grad(loss, (0, 1))(q, sinks))
