"""Every implementation of paged attention equals a plain numpy softmax.

The GPU's decode kernel runs in interpret mode and cuDNN's part as XLA. No interpreter of jax runs its TPU
kernel (it reshapes references), so the kernel's own reference, which has the same contract, runs in its
place.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as library
from jmoe_kernels import cpu
from jmoe_kernels.paged_attention import Heads, LayerPages, NewTokens, Span, pick, why_not
from jmoe_kernels.paged_attention.cases import LATENT, PLAIN, SIZE, TABLE, make_inputs, make_pages
from jmoe_kernels.paged_attention.reference import attention_reference
from jmoe_kernels.paged_attention.write import write
from support.paged_attention import interpreted_gpu, paged_attention

needs_library = pytest.mark.skipif(
    cpu.why_missing() is not None, reason=f"no C++ kernels here: {cpu.why_missing()}"
)
HERE = ["xla", pytest.param("cpu", marks=needs_library)]


def run_with(name: str):
    """Returns the implementation as a function of (new, pages, span, sinks)."""
    if name == "gpu":
        run = jax.jit(interpreted_gpu)
        return lambda new, pages, span, sinks: run(new, pages)
    run = partial(paged_attention, name)
    return run if name == "tpu" else jax.jit(run, static_argnums=2)


@pytest.fixture
def reference_kernel(monkeypatch):
    """Replaces jax's TPU kernel by jax's reference for it, which branches on values.

    Rows that the kernel leaves unwritten are not a number.
    """

    def reference(q, kv_pages, *args, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes, **kw):
        assert num_kv_pages_per_block <= TABLE and num_queries_per_block <= q.shape[0]
        library.dynamic_validate_inputs(q, kv_pages, *args, **kw)
        out = library.ref_ragged_paged_attention(q, kv_pages, *args, **kw)
        return jnp.full(q.shape, jnp.nan, q.dtype).at[: len(out)].set(out)

    monkeypatch.setattr(library, "ragged_paged_attention", reference)
    with jax.disable_jit():
        yield


def padded(a: np.ndarray, t: int) -> np.ndarray:
    return np.pad(a[:, :t], ((0, 0), (0, max(0, t - a.shape[1])), (0, 0), (0, 0)))


def check(
    name: str,
    t: int,
    prefill: int,
    heads: Heads,
    dtype,
    seed: int,
    atol: float,
    sinks: np.ndarray | None = None,
) -> None:
    """Prefills one sequence in the same step as another of one token, then decodes the rest token by token.

    The prefill takes two runs if it is long.
    """
    q, k, v, table = make_inputs(t, heads, dtype, seed)
    run = run_with(name)
    pages, outs = make_pages(name, heads, dtype), np.zeros_like(q)
    want = [attention_reference(q[i], k[i], v[i], heads.span, sinks) for i in range(2)]

    def step(start: int, end: int, length: int) -> None:
        nonlocal pages
        positions = np.full((2, length), -1, np.int32)
        positions[0, : end - start] = np.arange(start, end)
        if start == 0:
            positions[1, 0] = 0
        rows = [padded(a[:, start:end], length) for a in (q, k, v)]
        new = NewTokens(*rows[:2], None if heads.value_dim else rows[2], positions, table)
        out, pages = run(new, pages, heads.span, sinks)
        out = np.asarray(out)
        assert np.isfinite(out).all() and out.dtype == np.float32
        outs[0, start:end] = out[0, : end - start]
        if start == 0:
            outs[1, 0] = out[1, 0]

    whole = prefill - prefill % SIZE if prefill > 2 * SIZE else 0  # a long prompt takes two runs
    if whole:
        step(0, whole, whole)
    step(whole, prefill, max(SIZE, -(-(prefill - whole) // SIZE) * SIZE)) if prefill > whole else None
    for i in range(prefill, t):
        step(i, i + 1, 1)
    np.testing.assert_allclose(outs[0], want[0], atol=atol, rtol=atol)
    np.testing.assert_allclose(outs[1, 0], want[1][0], atol=atol, rtol=atol)


@pytest.mark.matrix
@pytest.mark.parametrize("name", HERE)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_split_equals_numpy(data, name: str):
    window = data.draw(st.sampled_from([None, 40]), label="window")
    t = data.draw(st.integers(2, 60), label="tokens")
    prefill = data.draw(st.integers(1, t - 1), label="prefill")
    check(name, t, prefill, replace(PLAIN, span=Span(window)), jnp.float32, t, 2e-5)


SPANS = st.one_of(
    st.just(Span()),
    st.builds(Span, window=st.integers(1, 50)),
    st.builds(Span, chunk=st.integers(1, 50)),  # within a page or over several, whole pages or not
)


@pytest.mark.matrix
@pytest.mark.parametrize("name", HERE)
@settings(max_examples=16, deadline=None)
@given(data=st.data())
def test_any_span_sinks_and_heads_equal_numpy(data, name: str):
    """45 tokens lie in six pages: a prompt of one run or two comes first, then token by token."""
    heads = data.draw(st.sampled_from([PLAIN, Heads(6, 1, 8), Heads(3, 3, 20), LATENT]), label="heads")
    heads = replace(heads, span=data.draw(SPANS, label="span"))
    sink = data.draw(st.sampled_from([None, 0.0, 3.0, 1e4, -1e4]), label="sink")
    sinks = None if sink is None else np.linspace(sink, sink / 2 + 1, heads.num_query_heads, dtype=np.float32)
    dtype, atol = data.draw(st.sampled_from([(jnp.float32, 2e-5), (jnp.uint16, 3e-2)]), label="pages")
    check(name, 45, data.draw(st.sampled_from([3, 16, 21]), label="prompt"), heads, dtype, 1, atol, sinks)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(
    ("span", "sees"),
    [(Span(), 0), (Span(window=30), 591), (Span(chunk=200), 600), (Span(chunk=90), 540)],
    ids=str,
)
@pytest.mark.parametrize("heads", [PLAIN, LATENT], ids=["plain", "latent"])
def test_a_long_context_reads_from_the_first_key_that_is_seen(name: str, heads: Heads, span: Span, sees: int):
    """The queries are a token at 620 and then the run of a page.

    Keys that lie a block of the loop before the first visible key are not a number.
    """
    rng, long = np.random.default_rng(5), 80  # pages
    shape = (long, heads.num_kv_heads, SIZE, heads.head_dim)
    k, v = (rng.standard_normal(shape, np.float32) for _ in range(2))
    table = rng.permutation(long).astype(np.int32)
    for start, t in ((620, 1), (624, SIZE)):
        q = rng.standard_normal((1, t, heads.num_query_heads, heads.head_dim), np.float32)
        new_k, new_v = (
            rng.standard_normal((1, t, heads.num_kv_heads, heads.head_dim), np.float32) for _ in range(2)
        )
        rows = [
            np.moveaxis(a[table], 2, 1).reshape(-1, heads.num_kv_heads, heads.head_dim)[:start]
            for a in (k, v)
        ]
        keys, values = (np.concatenate([a, n[0]]) for a, n in zip(rows, (new_k, new_v), strict=True))
        want = attention_reference(q[0], keys, keys if heads.value_dim else values, span)
        kept = [np.array(a) for a in (k, v)]
        for a in kept:
            a[table[: max(0, sees - 128) // SIZE]] = np.nan
        new = NewTokens(q, new_k, None if heads.value_dim else new_v, start + np.arange(t)[None], table[None])
        out, _ = run_with(name)(new, LayerPages(tuple(kept[: 1 if heads.value_dim else 2])), span, None)
        np.testing.assert_allclose(out[0], want, atol=2e-5)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("sink", [None, 1.0, -1e4])
def test_a_step_of_padding_alone_is_finite_and_writes_nothing(name: str, sink: float | None):
    pages = make_pages(name, PLAIN, jnp.float32)
    rows = [np.ones((2, SIZE, n, 8), np.float32) for n in (4, 2, 2)]
    new = NewTokens(*rows, np.full((2, SIZE), -1, np.int32), np.zeros((2, TABLE), np.int32))
    sinks = None if sink is None else jnp.full(4, sink)
    out, pages = run_with(name)(new, pages, Span(chunk=5), sinks)
    assert (np.asarray(out) == 0).all() and all((np.asarray(kept) == 7).all() for kept in pages.kv)


@needs_library
@pytest.mark.parametrize("heads", [PLAIN, LATENT], ids=["plain", "latent"])
def test_the_cpu_writes_a_step_in_place(heads: Heads):
    """A donated pool is not copied, and no second array of its size exists."""
    pages = make_pages("cpu", heads, jnp.uint16)
    rows = [
        np.ones((2, 1, n, heads.head_dim), np.float32)
        for n in (heads.num_query_heads, heads.num_kv_heads, heads.num_kv_heads)
    ]
    at = np.zeros((2, 1), np.int32), np.zeros((2, TABLE), np.int32)
    new = NewTokens(*rows[:2], None if heads.value_dim else rows[2], *at)
    run = jax.jit(partial(paged_attention, "cpu"), donate_argnums=1).lower(new, pages).compile()
    pool = "u16[" + ",".join(map(str, pages.kv[0].shape)) + "]"
    made = [line.split(" = ")[1] for line in run.as_text().splitlines() if " = " in line and pool in line]
    assert made and not any(" copy(" in line or " fusion(" in line for line in made)
    memory = run.memory_analysis()
    assert memory.alias_size_in_bytes == sum(kept.nbytes for kept in pages.kv) > memory.temp_size_in_bytes


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("dtype", "heads", "window"),
    [(jnp.float32, (4, 2), None), (jnp.float32, (8, 1), 12), (jnp.bfloat16, (2, 2), None)],
    ids=str,
)
@pytest.mark.usefixtures("reference_kernel")
def test_tpu_equals_numpy(dtype, heads: tuple[int, int], window: int | None):
    check("tpu", 20, 18, Heads(*heads, 128, Span(window)), dtype, 1, 2e-5 if dtype == jnp.float32 else 3e-2)


@pytest.mark.parametrize("heads", [(4, 2), (16, 1), (2, 2)], ids=str)
def test_gpu_equals_numpy(heads: tuple[int, int]):
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention needs it
        check("gpu", 20, 18, Heads(*heads, 64), jnp.bfloat16, 2, 3e-2)


@pytest.mark.parametrize("name", ["xla", "tpu"])
def test_a_run_that_is_not_whole_pages_is_refused(name: str):
    heads = Heads(2, 1, 128)
    new = NewTokens(*[jnp.zeros((1, 12, n, 128)) for n in (2, 1, 1)], *[jnp.zeros((1, 12), jnp.int32)] * 2)
    with pytest.raises(ValueError, match="12 tokens is not a multiple of the page size 8"):
        paged_attention(name, new, make_pages(name, heads, jnp.float32))


def test_padding_is_written_nowhere():
    pages, new = jnp.full((4, 1, SIZE, 2), 7.0), jnp.ones((2, 1, 1, 2))
    positions, table = np.array([[-1], [9]], np.int32), np.array([[0, 1], [2, 3]], np.int32)
    got = np.asarray(write(pages, new, positions, table))
    assert (got == 1).sum() == 2 and (got[3, 0, 1] == 1).all()


@pytest.mark.parametrize(
    ("platform", "heads", "dtype", "reason"),
    [
        ("tpu", Heads(8, 2, 64), "bfloat16", "head dimension must be a multiple of 128, got 64"),
        ("tpu", Heads(6, 3, 128), "bfloat16", "3 bfloat16 kv heads per rank do not tile"),
        ("gpu", Heads(8, 2, 64), "float32", "must be bfloat16, got float32"),
        ("gpu", Heads(8, 2, 96), "bfloat16", "head dimension must be 16, 32, 64 or 128, got 96"),
        ("gpu", Heads(8, 2, 64, Span(9)), "bfloat16", "a sliding window is not supported"),
        ("gpu", Heads(8, 2, 64, has_sinks=True), "bfloat16", "attention sinks are not supported"),
        ("gpu", Heads(8, 2, 64, Span(chunk=9)), "bfloat16", "attention within chunks is not supported"),
        ("gpu", Heads(8, 1, 64, value_dim=32), "bfloat16", "latent pages are not supported"),
        ("tpu", Heads(8, 2, 128, Span(9), has_sinks=True), "bfloat16", "attention sinks are not supported"),
        ("tpu", Heads(8, 2, 128, Span(chunk=9)), "bfloat16", "attention within chunks is not supported"),
        ("tpu", Heads(8, 1, 640, value_dim=512), "bfloat16", "latent pages are not supported"),
        ("cpu", Heads(8, 2, 64), "float32", "needs a tpu, this is a cpu"),
    ],
)
def test_limits_are_named_and_the_portable_form_serves(platform, heads, dtype, reason):
    name = platform if platform != "cpu" else "tpu"
    assert reason in why_not(name, platform, dtype, heads) and "'xla' can run" in why_not(
        name, platform, dtype, heads
    )
    if platform != "cpu":
        picked, why = pick(platform, dtype, [heads])
        assert picked == "xla" and reason in why


@pytest.mark.parametrize("name", ["tpu", "gpu"])
@pytest.mark.parametrize(
    ("heads", "sinks", "reason"),
    [
        (Heads(2, 1, 128, Span(chunk=9)), None, "attention within chunks"),
        (Heads(2, 1, 128), np.zeros(2, np.float32), "attention sinks"),
        (Heads(2, 1, 128, value_dim=9), None, "latent pages"),
    ],
    ids=["chunk", "sinks", "latent"],
)
def test_a_named_kernel_refuses_what_it_has_not(name: str, heads: Heads, sinks, reason: str):
    q, kv = (jnp.zeros((1, 1, n, 128)) for n in (2, 1))
    at = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, TABLE), jnp.int32)
    new = NewTokens(q, kv, None if heads.value_dim else kv, *at)
    with pytest.raises(ValueError, match=f"'{name}': {reason} (is|are) not supported; 'xla' can run"):
        paged_attention(name, new, make_pages(name, heads, jnp.bfloat16), heads.span, sinks)


def test_a_span_is_one_of_two():
    assert [Span().first(7), Span(window=3).first(7), Span(chunk=3).first(7)] == [0, 5, 6]
    np.testing.assert_array_equal(Span(chunk=4).first(jnp.arange(6)), [0, 0, 0, 0, 4, 4])
    with pytest.raises(ValueError, match=r"a window \(3\) or a chunk \(4\), not both"):
        Span(3, 4)
    for size in ({"window": 0}, {"chunk": -2}):
        with pytest.raises(ValueError, match="at least 1 token"):
            Span(**size)


def test_an_unknown_name_lists_the_known_ones():
    assert "known: xla, cpu, tpu, gpu" in why_not("flash", "cpu", "float32", Heads(1, 1, 8))
    assert pick("tpu", "bfloat16", [Heads(8, 2, 128)]) == ("tpu", "jax's ragged paged attention")
