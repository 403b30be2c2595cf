"""Paged attention: every implementation equals a plain numpy softmax.

The GPU's decode kernel runs in interpret mode and cuDNN's part as XLA. No interpreter of jax runs its TPU
kernel (it reshapes references), so there the kernel's own reference stands in, which shares its contract.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import by_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as library
from jmoe_kernels import cpu
from jmoe_kernels.paged_attention import (
    Heads,
    LayerPages,
    NewTokens,
    page_shapes,
    paged_attention,
    pick,
    supports,
)
from jmoe_kernels.paged_attention.gpu import paged_attention_gpu
from jmoe_kernels.paged_attention.xla import write

SIZE, PAGES, TABLE = 8, 40, 16  # rows of a page, pages of the cache, pages of a table


def run_with(name: str):
    """The implementation as a function of (new, pages, window)."""
    if name == "gpu":
        return jax.jit(partial(paged_attention_gpu, interpret=True), static_argnames="window")
    run = partial(paged_attention, name)
    return run if name == "tpu" else jax.jit(run, static_argnames="window")


@pytest.fixture
def reference_kernel(monkeypatch):
    """jax's reference for its TPU kernel; rows that the kernel leaves unwritten are not a number."""

    def reference(q, kv_pages, *args, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes, **kw):
        assert num_kv_pages_per_block <= TABLE and num_queries_per_block <= q.shape[0]
        library.dynamic_validate_inputs(q, kv_pages, *args, **kw)
        out = library.ref_ragged_paged_attention(q, kv_pages, *args, **kw)
        return jnp.full(q.shape, jnp.nan, q.dtype).at[: len(out)].set(out)

    monkeypatch.setattr(library, "ragged_paged_attention", reference)


def case(t: int, heads: Heads, dtype, seed: int):
    """Queries, keys and values of two sequences of ``t`` tokens, page tables that share no page, pages."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((2, t, n, heads.dim)).astype(np.float32)
        for n in (heads.query, heads.kv, heads.kv)
    )
    if dtype == jnp.bfloat16:
        q, k, v = (np.asarray(jnp.asarray(a, dtype).astype(jnp.float32)) for a in (q, k, v))
    table = rng.permutation(PAGES)[: 2 * TABLE].reshape(2, TABLE).astype(np.int32)
    return q, k, v, table


def filled(name: str, heads: Heads, dtype) -> LayerPages:
    """Pages full of what earlier sequences left."""
    shapes = page_shapes(name, PAGES, heads.kv, SIZE, heads.dim)
    return LayerPages(tuple(jnp.full(shape, 7.0, dtype) for shape in shapes))


def padded(a: np.ndarray, t: int) -> np.ndarray:
    return np.pad(a[:, :t], ((0, 0), (0, max(0, t - a.shape[1])), (0, 0), (0, 0)))


def check(name: str, t: int, prefill: int, heads: Heads, dtype, seed: int, atol: float) -> None:
    """A prefill of one sequence beside another of one token, the rest token by token, in two runs if long."""
    q, k, v, table = case(t, heads, dtype, seed)
    run = run_with(name)
    pages, outs = filled(name, heads, dtype), np.zeros_like(q)
    want = [by_numpy(q[i], k[i], v[i], heads.window) for i in range(2)]

    def step(start: int, end: int, length: int) -> None:
        nonlocal pages
        positions = np.full((2, length), -1, np.int32)
        positions[0, : end - start] = np.arange(start, end)
        if start == 0:
            positions[1, 0] = 0
        new = NewTokens(*(padded(a[:, start:end], length) for a in (q, k, v)), positions, table)
        out, pages = run(new, pages, window=heads.window)
        out = np.asarray(out)
        assert np.isfinite(out).all() and out.dtype == np.float32
        outs[0, start:end] = out[0, : end - start]
        if start == 0:
            outs[1, 0] = out[1, 0]

    whole = prefill - prefill % SIZE if prefill > 2 * SIZE else 0  # a long prompt comes in two runs
    if whole:
        step(0, whole, whole)
    step(whole, prefill, max(SIZE, -(-(prefill - whole) // SIZE) * SIZE)) if prefill > whole else None
    for i in range(prefill, t):
        step(i, i + 1, 1)
    np.testing.assert_allclose(outs[0], want[0], atol=atol, rtol=atol)
    np.testing.assert_allclose(outs[1, 0], want[1][0], atol=atol, rtol=atol)


@pytest.mark.parametrize("name", ["xla", "cpu"])
@pytest.mark.parametrize("window", [None, 40])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_split_equals_numpy(data, name: str, window: int | None):
    if name == "cpu" and isinstance(reason := cpu.get_library(), str):
        pytest.skip(reason)
    t = data.draw(st.integers(2, 60), label="tokens")
    prefill = data.draw(st.integers(1, t - 1), label="prefill")
    check(name, t, prefill, Heads(4, 2, 8, window), jnp.float32, t, 2e-5)


@pytest.mark.parametrize(
    ("dtype", "heads", "window"),
    [(jnp.float32, (4, 2), None), (jnp.float32, (8, 1), 12), (jnp.bfloat16, (2, 2), None)],
    ids=str,
)
@pytest.mark.usefixtures("reference_kernel")
def test_tpu_equals_numpy(dtype, heads: tuple[int, int], window: int | None):
    check("tpu", 20, 18, Heads(*heads, 128, window), dtype, 1, 2e-5 if dtype == jnp.float32 else 3e-2)


@pytest.mark.parametrize("heads", [(4, 2), (16, 1), (2, 2)], ids=str)
def test_gpu_equals_numpy(heads: tuple[int, int]):
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention needs it
        check("gpu", 20, 18, Heads(*heads, 64), jnp.bfloat16, 2, 3e-2)


@pytest.mark.parametrize("name", ["xla", "tpu"])
def test_a_run_that_is_not_whole_pages_is_refused(name: str):
    heads = Heads(2, 1, 128)
    new = NewTokens(*[jnp.zeros((1, 12, n, 128)) for n in (2, 1, 1)], *[jnp.zeros((1, 12), jnp.int32)] * 2)
    with pytest.raises(ValueError, match="12 tokens is not a multiple of the page size 8"):
        paged_attention(name, new, filled(name, heads, jnp.float32))


def test_padding_is_written_nowhere():
    pages, new = jnp.full((4, 1, SIZE, 2), 7.0), jnp.ones((2, 1, 1, 2))
    positions, table = np.array([[-1], [9]], np.int32), np.array([[0, 1], [2, 3]], np.int32)
    got = np.asarray(write(pages, new, positions, table))
    assert (got == 1).sum() == 2 and (got[3, 0, 1] == 1).all()


@pytest.mark.parametrize(
    ("platform", "heads", "dtype", "reason"),
    [
        ("tpu", Heads(8, 2, 64), "bfloat16", "head dimension must be a multiple of 128, got 64"),
        ("tpu", Heads(6, 3, 128), "bfloat16", "3 bfloat16 kv heads a rank do not tile"),
        ("gpu", Heads(8, 2, 64), "float32", "must be bfloat16, got float32"),
        ("gpu", Heads(8, 2, 96), "bfloat16", "head dimension must be 16, 32, 64 or 128, got 96"),
        ("gpu", Heads(8, 2, 64, 9), "bfloat16", "a sliding window is not supported"),
        ("cpu", Heads(8, 2, 64), "float32", "needs a tpu, this is a cpu"),
    ],
)
def test_limits_are_named_and_the_portable_form_serves(platform, heads, dtype, reason):
    name = platform if platform != "cpu" else "tpu"
    assert reason in supports(name, platform, dtype, heads) and "'xla' can run" in supports(
        name, platform, dtype, heads
    )
    if platform != "cpu":
        picked, why = pick(platform, dtype, heads)
        assert picked == "xla" and reason in why


def test_an_unknown_name_lists_the_known_ones():
    assert "known: xla, cpu, tpu, gpu" in supports("flash", "cpu", "float32", Heads(1, 1, 8))
    assert pick("tpu", "bfloat16", Heads(8, 2, 128)) == ("tpu", "jax's ragged paged attention")
