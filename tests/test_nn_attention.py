"""Attention over pages equals attention over the window equals a plain numpy softmax, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small import config, decoder, mesh_of, tokens

from jmoe.mesh import token_ranks
from jmoe.nn.attention import Sequences, attend_pages, attend_window
from jmoe.nn.kv_cache import LayerPages, make_pages, write
from jmoe.nn.norm import rms_norm
from jmoe.nn.rope import rotate, rotation


def by_numpy(q, k, v, window):
    """[T, H, d] causal attention of one sequence."""
    t, h, d = q.shape
    per = h // k.shape[1]
    gap = np.arange(t)[:, None] - np.arange(t)[None]
    seen = (gap >= 0) & (gap < (window or t))
    out = np.zeros_like(q)
    for i in range(h):
        s = np.where(seen, q[:, i] @ k[:, i // per].T / np.sqrt(d), -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        out[:, i] = p / p.sum(-1, keepdims=True) @ v[:, i // per]
    return out


def qkv(t, h=4, g=2, d=8, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((2, t, n, d), np.float32) for n in (h, g, g))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("t", [1, 7, 130, 300])
def test_window_equals_numpy(t: int, window: int | None):
    q, k, v = qkv(t)
    positions = jnp.broadcast_to(jnp.arange(t), (2, t))
    out = attend_window(q, k, v, positions, window)
    for b in range(2):
        np.testing.assert_allclose(out[b], by_numpy(q[b], k[b], v[b], window), atol=2e-5)


@pytest.mark.parametrize("window", [None, 40])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_pages_equal_numpy(data, window: int | None):
    """Any split of a sequence into a prefill and single tokens, in shuffled pages, beside a shorter one."""
    size, pages = 4, 64
    t = data.draw(st.integers(2, 60), label="tokens")
    prefill = data.draw(st.integers(1, t - 1), label="prefill")
    q, k, v = qkv(t, seed=t)
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="page order"))
    table = rng.permutation(pages)[: 2 * 16].reshape(2, 16).astype(np.int32)
    cache = LayerPages(*[jnp.full((pages, 2, size, 8), 7.0)] * 2)
    run = -(-prefill // size) * size
    positions = np.full((2, run), -1, np.int32)
    positions[0, :prefill] = np.arange(prefill)
    positions[1, :1] = 0
    pad = [np.pad(a, ((0, 0), (0, max(0, run - t)), (0, 0), (0, 0)))[:, :run] for a in (q, k, v)]
    cache = write(cache, jnp.asarray(pad[1]), jnp.asarray(pad[2]), positions, table)
    out = attend_pages(pad[0], cache, positions, table, window)
    want = by_numpy(q[0], k[0], v[0], window)
    np.testing.assert_allclose(out[0, :prefill], want[:prefill], atol=2e-5)
    np.testing.assert_allclose(out[1, 0], by_numpy(q[1], k[1], v[1], window)[0], atol=2e-5)
    for i in range(prefill, t):
        at = np.array([[i], [-1]], np.int32)
        cache = write(cache, jnp.asarray(k[:, i : i + 1]), jnp.asarray(v[:, i : i + 1]), at, table)
    out = attend_pages(q[:, t - 1 : t], cache, np.array([[t - 1], [-1]], np.int32), table, window)
    np.testing.assert_allclose(out[0, 0], want[t - 1], atol=2e-5)


def test_a_run_that_is_not_whole_pages_is_refused():
    pages, new = LayerPages(*[jnp.zeros((4, 1, 8, 2))] * 2), jnp.zeros((1, 12, 1, 2))
    with pytest.raises(ValueError, match="not a multiple of the page size 8"):
        write(pages, new, new, jnp.zeros((1, 12), jnp.int32), jnp.zeros((1, 2), jnp.int32))


def test_rope_depends_on_distance_only():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 1, 8), np.float32))
    near = rotate(x, rotation(jnp.array([[3, 5]]), 8, 1e4))
    far = rotate(x, rotation(jnp.array([[103, 105]]), 8, 1e4))
    dot = lambda r: float(jnp.vdot(r[0, 0], r[0, 1]))  # noqa: E731
    assert dot(near) == pytest.approx(dot(far), abs=1e-4)


def test_rms_norm_is_unit_rms():
    y = rms_norm(
        jnp.asarray(np.random.default_rng(0).standard_normal((3, 16), np.float32)) * 9, jnp.ones(16), 0.0
    )
    np.testing.assert_allclose(jnp.mean(y**2, -1), 1, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)], ids=str)
def test_decoder_on_a_mesh_equals_one_device(shape, qk_norm: str):
    """8 tensor ranks over 2 kv heads: the kv heads are replicated. With and without the cache."""
    cfg = config(
        qk_norm=qk_norm, attention_bias=qk_norm == "none", sliding_window=6 if qk_norm == "full" else None
    )
    ids = tokens(cfg, 8, 16)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)).copy()
    positions[3, 9:] = -1

    def logits(mesh, paged):
        model = decoder(cfg, mesh)
        graph, state = nnx.split(model)
        pages = table = None
        if paged:
            per_rank = 8 // token_ranks(mesh)
            table = np.tile(
                np.arange(2 * per_rank, dtype=np.int32).reshape(per_rank, 2), (token_ranks(mesh), 1)
            )
            pages = make_pages(cfg, mesh, 2 * per_rank, 8)

        def forward(state, pages):
            model = nnx.merge(graph, state)
            return model.logits(model(Sequences(ids, positions, table), pages).hidden_BTD)

        return np.asarray(jax.jit(forward)(state, pages))

    want = logits(mesh_of((1, 1, 1)), False)
    for paged in (False, True):
        got = logits(mesh_of(shape), paged)
        np.testing.assert_allclose(got[positions >= 0], want[positions >= 0], atol=3e-4)
