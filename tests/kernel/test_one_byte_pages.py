"""Pages of one byte a number: what they hold, and attention over it.

The oracle reads the numbers that the pages hold, in float64. The GPU's decode kernel runs in interpret mode;
in place of the TPU's runs jax's own reference for it, as in ``test_paged_attention``.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as library
from jmoe_kernels import cpu
from jmoe_kernels.paged_attention import (
    Heads,
    LayerPages,
    NewTokens,
    Span,
    has_scales,
    page_shapes,
    pick,
    why_not,
)
from jmoe_kernels.paged_attention.cases import LATENT, PAGES, PLAIN, SIZE, TABLE, make_inputs
from jmoe_kernels.paged_attention.one_byte import LARGEST, quantise_rows
from jmoe_kernels.paged_attention.reference import attention_reference
from jmoe_kernels.quantised import DTYPES, code_storage
from support.paged_attention import interpreted_gpu, paged_attention

needs_library = pytest.mark.skipif(
    cpu.why_missing() is not None, reason=f"no C++ kernels here: {cpu.why_missing()}"
)
HERE = ["xla", pytest.param("cpu", marks=needs_library)]
CODES = ["int8", "e4m3"]
STEP = {"int8": 0.5 / 127, "e4m3": 1 / 16}  # largest error, of a row's largest magnitude and of the number
STEPS = [(0, 16), (16, 29), (29, 30), (30, 31), (31, 32), (32, 33)]  # a prompt in two runs, then tokens


def empty_pages(name: str, heads: Heads, code: str) -> LayerPages:
    """Returns pages whose numbers and scales are what poisons most: NaN, and the largest code."""
    shapes = page_shapes(
        name, PAGES, heads.num_kv_heads, SIZE, heads.head_dim, latent=heads.value_dim is not None
    )
    dtype = code_storage(code, "cpu") if name in ("xla", "cpu") else DTYPES[code]
    worst = {np.dtype(np.int8): 127, np.dtype(np.uint8): 0x7F}.get(np.dtype(dtype), np.nan)
    kv = tuple(jnp.full(shape, worst, dtype) for shape in shapes)
    if not has_scales(name):
        return LayerPages(kv)
    return LayerPages(kv, tuple(jnp.full(shape[:-1], np.nan, jnp.float32) for shape in shapes))


def held(pages: LayerPages, table_M: np.ndarray, length: int) -> list[np.ndarray]:
    """Returns the numbers that pages hold of a sequence, ``[T, G, d]`` in float64, of keys and of values."""
    found = []
    for i, codes in enumerate(map(np.asarray, pages.kv)):
        numbers = (codes.view(ml_dtypes.float8_e4m3fn) if codes.dtype == np.uint8 else codes).astype(
            np.float64
        )
        if pages.scales is not None:
            numbers *= np.asarray(pages.scales[i])[..., None]
        found.append(numbers[table_M])
    if len(found) == 1 and found[0].shape[1] == SIZE and pages.scales is None:  # joined
        both = found[0].reshape(-1, *found[0].shape[2:])[:length]
        return [both[:, ::2], both[:, 1::2]]
    rows = [np.moveaxis(a, 1, 2).reshape(-1, a.shape[1], a.shape[3])[:length] for a in found]
    return [rows[0], rows[-1]]


def run_with(name: str):
    if name == "gpu":
        run = jax.jit(interpreted_gpu)
        return lambda new, pages, span, sinks: run(new, pages)
    run = partial(paged_attention, name)
    return run if name == "tpu" else jax.jit(run, static_argnums=2)


def check(name: str, heads: Heads, code: str, sinks=None, atol: float = 2e-5) -> None:
    q, k, v, table = make_inputs(33, heads, jnp.float32 if name in ("xla", "cpu") else jnp.bfloat16)
    run, pages = run_with(name), empty_pages(name, heads, code)
    for start, end in STEPS:
        length = end - start if end - start == 1 else -(-(end - start) // SIZE) * SIZE
        positions = np.full((2, length), -1, np.int32)
        positions[0, : end - start] = np.arange(start, end)

        def padded(a: np.ndarray, start=start, end=end, length=length) -> np.ndarray:
            return np.pad(a[:, start:end], ((0, 0), (0, length - end + start), (0, 0), (0, 0)))

        new = NewTokens(padded(q), padded(k), None if heads.value_dim else padded(v), positions, table)
        out, pages = run(new, pages, heads.span, sinks)
        keys, values = held(pages, table[0], end)
        want = attention_reference(q[0, start:end].astype(np.float64), keys, values, heads.span, sinks)
        np.testing.assert_allclose(out[0, : end - start], want, atol=atol, rtol=atol)
        assert (np.asarray(out[1]) == 0).all()
        for rows, numbers in ((keys, k[0, :end]), (values, v[0, :end])):
            most = np.abs(numbers).max(-1, keepdims=True) if code == "int8" else np.abs(numbers)
            assert (np.abs(rows - numbers) <= most * STEP[code] + 1e-3).all()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(
    ("heads", "sink"),
    [(PLAIN, None), (replace(PLAIN, span=Span(window=11)), 1.0), (LATENT, None)],
    ids=["plain", "window and sinks", "latent"],
)
def test_attention_equals_numpy_over_what_the_pages_hold(name: str, code: str, heads: Heads, sink):
    check(name, heads, code, None if sink is None else np.full(heads.num_query_heads, sink, np.float32))


@pytest.mark.parametrize("code", CODES)
def test_so_does_the_gpus(code: str):
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention needs it
        check("gpu", Heads(4, 2, 64), code, atol=3e-2)


def test_so_does_the_tpus_without_scales(monkeypatch):
    """Keys and values beyond e4m3's range become its largest number."""

    def reference(q, kv_pages, *args, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes, **kw):
        library.dynamic_validate_inputs(q, kv_pages, *args, **kw)
        out = library.ref_ragged_paged_attention(q, kv_pages, *args, **kw)
        return jnp.full(q.shape, jnp.nan, q.dtype).at[: len(out)].set(out)

    monkeypatch.setattr(library, "ragged_paged_attention", reference)
    with jax.disable_jit():
        check("tpu", Heads(4, 2, 128), "e4m3", atol=3e-2)
        rows = np.full((1, 1, 2, 128), 1e4, np.float32)
        new = NewTokens(rows, rows, -rows, np.zeros((1, 1), np.int32), np.zeros((1, TABLE), np.int32))
        _, pages = paged_attention("tpu", new, empty_pages("tpu", Heads(2, 2, 128), "e4m3"))
        first = np.asarray(pages.kv[0][0, 0]).astype(np.float32)
        assert (first[::2] == 448).all() and (first[1::2] == -448).all()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("t", [1, SIZE])
def test_scales_that_a_query_does_not_see_do_not_reach_it(name: str, code: str, t: int):
    q, k, v, table = make_inputs(3 * SIZE, PLAIN, jnp.float32)
    run = run_with(name)

    def step(start: int, num_tokens: int, length: int, pages: LayerPages):
        at = np.full((2, length), -1, np.int32)
        at[:, :num_tokens] = np.arange(start, start + num_tokens)
        rows = (a[:, start : start + length] for a in (q, k, v))
        return run(NewTokens(*rows, at, table), pages, Span(), None)

    num_tokens = max(1, t - 2)  # the rest of the run is padding
    _, pages = step(0, 2 * SIZE, 2 * SIZE, empty_pages(name, PLAIN, code))
    clean, _ = step(2 * SIZE, num_tokens, t, pages)
    assert np.isfinite(np.asarray(clean)).all()
    assert pages.scales is not None
    seen = np.zeros((PAGES, SIZE), bool)
    seen[table[0, :2]] = True
    seen[table[0, 2], :num_tokens] = True
    for bad in (np.inf, -np.inf, np.nan):
        scales = tuple(jnp.where(seen[:, None], a, bad) for a in pages.scales)
        got, _ = step(2 * SIZE, num_tokens, t, LayerPages(pages.kv, scales))
        np.testing.assert_array_equal(np.asarray(got)[0], np.asarray(clean)[0])


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_shows(name: str, code: str, bad: float):
    q, k, v, table = make_inputs(2 * SIZE, PLAIN, jnp.float32)
    v[0, 3, :, 2] = bad
    at = np.arange(2 * SIZE, dtype=np.int32)[None].repeat(2, 0)
    out, _ = run_with(name)(NewTokens(q, k, v, at, table), empty_pages(name, PLAIN, code), Span(), None)
    is_finite = np.isfinite(np.asarray(out)).all((2, 3))
    assert is_finite[0, :3].all() and not is_finite[0, 3:].any() and is_finite[1].all()


@pytest.mark.parametrize("code", CODES)
def test_codes_are_the_nearest_and_extremes_are_safe(code: str):
    rows = np.random.default_rng(1).standard_normal((64, 48)).astype(np.float32)
    rows *= np.exp(np.linspace(-60, 60, 64, dtype=np.float32))[:, None]
    rows[0], rows[1], rows[2] = 0, 1e-38, 3e38
    codes, scales = jax.jit(quantise_rows, static_argnums=1)(rows, DTYPES[code])
    assert np.isfinite(np.asarray(codes, np.float32)).all() and np.isfinite(scales).all()
    got = np.asarray(codes).astype(np.float64) * np.asarray(scales, np.float64)[:, None]
    most = np.abs(rows).max(-1, keepdims=True).astype(np.float64)
    bound = most * STEP["int8"] if code == "int8" else np.abs(rows) * STEP["e4m3"] + most * 2**-10 / 448
    usual = slice(2, None)
    assert (np.abs(got - rows) <= bound * 1.001)[usual].all() and np.abs(got[:2]).max() < 1e-29
    assert (np.abs(np.asarray(codes, np.float32)).max(-1)[usual] == LARGEST[code]).all()


@needs_library
@pytest.mark.parametrize("heads", [PLAIN, LATENT], ids=["plain", "latent"])
def test_the_cpu_writes_codes_and_scales_in_place(heads: Heads):
    pages = empty_pages("cpu", heads, "int8")
    rows = [
        np.ones((2, 1, n, heads.head_dim), np.float32)
        for n in (heads.num_query_heads, heads.num_kv_heads, heads.num_kv_heads)
    ]
    at = np.zeros((2, 1), np.int32), np.zeros((2, TABLE), np.int32)
    new = NewTokens(*rows[:2], None if heads.value_dim else rows[2], *at)
    run = jax.jit(partial(paged_attention, "cpu"), donate_argnums=1).lower(new, pages).compile()
    memory = run.memory_analysis()
    assert memory.alias_size_in_bytes == sum(a.nbytes for a in jax.tree.leaves(pages))
    assert memory.temp_size_in_bytes < pages.kv[0].nbytes
    for kept in jax.tree.leaves(pages):
        name = {"int8": "s8", "float32": "f32"}[kept.dtype.name]
        pool = f"{name}[{','.join(map(str, kept.shape))}]"
        lines = [
            line.split(" = ")[1] for line in run.as_text().splitlines() if " = " in line and pool in line
        ]
        assert lines and not any(" copy(" in line or " fusion(" in line for line in lines)


@pytest.mark.parametrize(
    ("platform", "heads", "reason"),
    [
        ("tpu", Heads(8, 2, 128, code="int8"), "int8 pages, which have a scale for each row, are not"),
        ("tpu", Heads(8, 1, 128, code="e4m3"), "1 float8_e4m3fn kv heads per rank do not tile; 2, 4, 8"),
        ("tpu", Heads(8, 3, 128, code="e4m3"), "3 float8_e4m3fn kv heads per rank do not tile"),
        ("gpu", Heads(8, 1, 64, value_dim=32, code="int8"), "latent pages are not supported"),
    ],
)  # fmt: skip
def test_limits_are_named(platform: str, heads: Heads, reason: str):
    refusal = why_not(platform, platform, "bfloat16", heads)
    assert refusal is not None and reason in refusal and "'xla' can run" in refusal
    picked, why = pick(platform, "bfloat16", [heads])
    assert picked == "xla" and reason in why


def test_what_kernels_take():
    assert pick("tpu", "bfloat16", [Heads(8, 2, 128, code="e4m3")])[0] == "tpu"
    for code in ("int8", "e4m3"):
        assert pick("gpu", "bfloat16", [Heads(8, 2, 64, code=code)])[0] == "gpu"
        assert pick("gpu", "float32", [Heads(8, 2, 64, code=code)])[0] == "xla"


def test_a_named_kernel_refuses_pages_that_it_cannot_read():
    rows = [jnp.zeros((1, 1, n, 128)) for n in (2, 2, 2)]
    new = NewTokens(*rows, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, TABLE), jnp.int32))
    with pytest.raises(
        ValueError, match=r"'tpu': int8 pages, which have .* are not supported; 'xla' can run"
    ):
        paged_attention("tpu", new, empty_pages("tpu", Heads(2, 2, 128), "int8"))
