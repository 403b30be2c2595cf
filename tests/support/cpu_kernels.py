"""Checks of the C++ kernels against numpy, for one instruction set.

They also run in a process of their own, whose library is built with an address sanitizer and emulates AMX:

    python tests/support/cpu_kernels.py DIRECTORY [compiler flags ...]
"""

import itertools
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jmoe_kernels import cpu
from jmoe_kernels.cpu import build
from jmoe_kernels.grouped_mlp.cpu import ACTIVATIONS, combined_mlp_cpu, grouped_mlp_cpu
from jmoe_kernels.grouped_mlp.types import ExpertWeights

RNG, E4M3 = np.random.default_rng, ml_dtypes.float8_e4m3fn


def rounded(a: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)


def stored(a: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(a, jnp.bfloat16).view(jnp.uint16)


def check_linear(rows=(1, 3, 8, 9, 17, 65), inner=(7, 33, 96), out=(1, 5, 12, 130)):
    rng = RNG(0)
    for m, k, n in itertools.product(rows, inner, out):
        x, w = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
        where = f"{m} x {k} x {n}"
        np.testing.assert_allclose(cpu.linear(x, w), x @ w.T, atol=1e-4, err_msg=where)
        want = rounded(x) @ rounded(w).T
        for w_kept in (stored(w), jnp.asarray(w, jnp.bfloat16)):
            np.testing.assert_allclose(cpu.linear(x, w_kept), want, atol=1e-4, err_msg=where)
        np.testing.assert_allclose(cpu.linear(jnp.asarray(x, jnp.bfloat16), stored(w)), want, atol=1e-4)


def act(name: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    if name == "silu":
        return gate * sigmoid(gate) * up
    if name == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if name == "relu":
        return np.maximum(gate, 0) * up
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate * sigmoid(1.702 * gate) * (up + 1)


def mlp(x, weights, sizes, activation, hidden=lambda h: h):
    """Runs every expert's rows through its MLP in numpy; ``hidden`` rounds what the second product reads."""
    gate_up, down, gate_up_bias, down_bias = weights
    y, start = np.zeros_like(x), 0
    for e, n in enumerate(sizes):
        rows = x[start : start + n]
        gate = rows @ gate_up[e, 0].T + gate_up_bias[e, 0]
        up = rows @ gate_up[e, 1].T + gate_up_bias[e, 1]
        y[start : start + n] = hidden(act(activation, gate, up)) @ down[e].T + down_bias[e]
        start += n
    return y


SHAPES = (  # group sizes, total rows, model, inner
    ((3, 0, 17, 5), 40, 32, 16),
    ((70, 0, 1, 9), 100, 64, 96),
    ((1, 1, 1, 1), 4, 96, 33),
    ((0, 0, 0, 0), 8, 32, 32),
    ((130, 64, 65, 8), 300, 100, 70),
    ((5,), 6, 20, 12),
)


def check_grouped():
    rng = RNG(1)
    for (sizes, n, d, f), name in itertools.product(SHAPES, ACTIVATIONS):
        e, used = len(sizes), sum(sizes)
        x = rng.standard_normal((n, d), np.float32)
        x[used:] = np.nan  # rows past the last group belong to no expert
        weights = [
            rng.standard_normal((e, 2, f, d), np.float32) * d**-0.5,
            rng.standard_normal((e, d, f), np.float32) * f**-0.5,
            rng.standard_normal((e, 2, f), np.float32),
            rng.standard_normal((e, d), np.float32),
        ]
        for part in weights:
            part[np.asarray(sizes) == 0] = np.nan  # never read
        counts = jnp.asarray(sizes, jnp.int32)
        plain = [np.nan_to_num(w) for w in weights]
        got = grouped_mlp_cpu(x, ExpertWeights(*map(jnp.asarray, weights)), counts, name)
        want = mlp(np.nan_to_num(x), plain, sizes, name)
        want[used:] = 0
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=f"{sizes} {name}")
        kept = ExpertWeights(*map(stored, weights[:2]), *map(jnp.asarray, weights[2:]))
        got = grouped_mlp_cpu(x, kept, counts, name)
        narrow = [*map(rounded, plain[:2]), *plain[2:]]
        want = mlp(rounded(np.nan_to_num(x)), narrow, sizes, name, rounded)
        want[used:] = 0
        # A hidden value on the edge between two bfloat16 numbers may fall to either side.
        np.testing.assert_allclose(got, want, atol=3e-2, err_msg=f"{sizes} {name} bfloat16")


def check_combined():
    """Checks that tokens gathered and combined by the kernel equal the form of rows.

    Some assignments belong to no expert.
    """
    rng = RNG(2)
    t, k, e, d, f = 13, 3, 5, 40, 24
    x = rng.standard_normal((t, d), np.float32)
    ids = np.stack([rng.permutation(e)[:k] for _ in range(t)]).reshape(-1)
    ids[rng.permutation(t * k)[:7]] = e  # assignments that no expert has
    order = np.argsort(ids, kind="stable").astype(np.int32)
    sizes = np.bincount(ids, minlength=e + 1)[:e]
    gate_up = rng.standard_normal((e, 2, f, d), np.float32) * d**-0.5
    down = rng.standard_normal((e, d, f), np.float32) * f**-0.5
    combine = rng.random((t, k), np.float32)
    none = [np.zeros((e, 2, f), np.float32), np.zeros((e, d), np.float32)]
    rows = mlp(x[order // k], (gate_up, down, *none), sizes, "silu")
    want = np.zeros_like(x)
    for row, n in enumerate(order[: sizes.sum()]):
        want[n // k] += combine.reshape(-1)[n] * rows[row]
    weights = ExpertWeights(jnp.asarray(gate_up), jnp.asarray(down))
    got = combined_mlp_cpu(x, combine, order, weights, jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(got, want, atol=1e-4)


def attention(q, k, v, positions, table, window, chunk, sinks):
    """Attends in numpy with one query after another to its own keys in order; padding gives zeros."""
    b, t, heads, d = q.shape
    _, groups, size, _ = k.shape
    out = np.zeros_like(q)
    for i, j, h in itertools.product(range(b), range(t), range(heads)):
        p = positions[i, j]
        if p < 0:
            continue
        first = max(0, p - window + 1) if window else p - p % chunk if chunk else 0
        at = [(table[i, s // size], h * groups // heads, s % size) for s in range(first, p + 1)]
        keys, values = (np.stack([a[place] for place in at]) for a in (k, v))
        scores = np.append(keys @ q[i, j, h] * d**-0.5, -np.inf if sinks is None else sinks[h])
        share = np.exp(scores - scores.max())
        out[i, j, h] = share[:-1] @ values / share.sum()
    return out


def check_attention():
    """Writes a run of keys and values into pages, then attends to them, in float32 and in bfloat16 pages.

    In latent pages, which have one KV head here, keys are values too.
    """
    rng = RNG(3)
    for b, t, heads, groups, d, size, table_len, window, chunk, sink in (
        (3, 1, 4, 2, 64, 32, 3, None, None, None),
        (2, 32, 4, 4, 16, 32, 2, None, None, 1.0),
        (1, 40, 6, 2, 20, 8, 8, 11, None, None),
        (4, 1, 8, 1, 24, 4, 9, 5, None, -1e4),
        (1, 70, 4, 1, 48, 16, 6, None, None, None),
        (1, 40, 6, 2, 20, 8, 8, None, 3, 2.0),
        (4, 1, 8, 2, 24, 4, 9, None, 10, 1e4),
        (1, 1, 40, 1, 72, 8, 40, None, None, None),  # the query heads of one KV head split over threads
        (2, 3, 130, 1, 36, 8, 3, None, None, 1.0),  # more heads than are multiplied with a page together
    ):
        latent = heads > 8
        sinks = None if sink is None else (sink * rng.random(heads)).astype(np.float32)
        pages = b * table_len + 2
        shape = (pages, groups, size, d)
        k, v = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
        q, new_k, new_v = (rng.standard_normal((b, t, h, d), np.float32) for h in (heads, groups, groups))
        table = rng.permutation(pages)[: b * table_len].reshape(b, table_len).astype(np.int32)
        start = rng.integers(0, table_len * size - t + 1, b)
        positions = (start[:, None] + np.arange(t)).astype(np.int32)
        positions[0, t - t // 4 :] = -1
        for keep, see, tolerance in ((jnp.asarray, np.asarray, 2e-5), (stored, rounded, 3e-2)):
            want_k, want_v = see(k).copy(), see(v).copy()
            for i, j in itertools.product(range(b), range(t)):
                if (p := positions[i, j]) >= 0:
                    want_k[table[i, p // size], :, p % size] = see(new_k[i, j])
                    want_v[table[i, p // size], :, p % size] = see(new_v[i, j])
            if latent:
                got_k, want_v = cpu.write_latent(keep(k), new_k, positions, table), want_k
                got_v = got_k
            else:
                got_k, got_v = cpu.write_pages(keep(k), keep(v), new_k, new_v, positions, table)
            as_float = (
                (lambda a: np.asarray(a.view(jnp.bfloat16), np.float32)) if keep is stored else np.asarray
            )
            np.testing.assert_array_equal(as_float(got_k), want_k)
            np.testing.assert_array_equal(as_float(got_v), want_v)
            got = cpu.attend(q, got_k, got_v, positions, table, (window, chunk), sinks)
            want = attention(q, want_k, want_v, positions, table, window, chunk, sinks)
            where = f"{b} {t} {heads} {groups} {d} {window} {chunk} {sink}"
            np.testing.assert_allclose(got, want, atol=tolerance, err_msg=where)


def codes_of(rows: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes of rows in one byte a number, and their scales."""
    largest = np.float32(127 if dtype == np.int8 else 448)
    most = np.abs(rows).max(-1)
    scaled = rows * (largest / most)[..., None]
    codes = np.rint(scaled).astype(np.int8) if dtype == np.int8 else scaled.astype(E4M3).view(np.uint8)
    return codes, most * (np.float32(1) / largest)


def check_one_byte_pages():
    """Writes a run into pages of one byte a number, then attends to them; the oracle reads what they hold.

    Scales that no query sees are not finite.
    """
    rng = RNG(5)
    for b, t, heads, groups, d, size, table_len, window, chunk, sink, dtype in (
        (3, 1, 4, 2, 64, 32, 3, None, None, None, np.int8),
        (2, 32, 4, 4, 16, 32, 2, None, None, 1.0, np.uint8),
        (1, 40, 6, 2, 20, 8, 8, 11, None, None, np.int8),
        (4, 1, 8, 2, 24, 4, 9, None, 10, 1e4, np.uint8),
        (1, 1, 40, 1, 72, 8, 40, None, None, None, np.int8),
        (2, 3, 130, 1, 37, 8, 3, None, None, 1.0, np.uint8),
    ):
        sinks = None if sink is None else (sink * rng.random(heads)).astype(np.float32)
        pages = b * table_len + 2
        q, *new = (rng.standard_normal((b, t, h, d), np.float32) for h in (heads, groups, groups))
        table = rng.permutation(pages)[: b * table_len].reshape(b, table_len).astype(np.int32)
        start = rng.integers(0, table_len * size - t + 1, b)
        positions = (start[:, None] + np.arange(t)).astype(np.int32)
        kept, want = [], []
        for rows in new[: 1 if heads > 8 else 2]:  # latent pages are keys and values at once
            codes, scales = codes_of(rng.standard_normal((pages, groups, size, d), np.float32), dtype)
            new_codes, new_scales = codes_of(rows, dtype)
            seen = np.full_like(scales, np.nan)
            for i in range(b):
                for p in range(positions[i, -1] + 1):
                    at = table[i, p // size], slice(None), p % size
                    seen[at] = scales[at]
                    if p >= start[i]:
                        codes[at], seen[at] = new_codes[i, p - start[i]], new_scales[i, p - start[i]]
            want.append((codes, seen))
            kept.append((jnp.asarray(codes), jnp.asarray(seen)))
        if len(kept) == 1:
            got = [cpu.write_latent(kept[0], new[0], positions, table)]
        else:
            got = cpu.write_pages(*kept, *new, positions, table)
        for array, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(array[0], expected[0])
            np.testing.assert_array_equal(array[1], expected[1])
        values = [
            (codes if dtype == np.int8 else codes.view(E4M3)).astype(np.float64) * scales[..., None]
            for codes, scales in want
        ]
        see = [window, chunk, sinks]
        expected = attention(q.astype(np.float64), values[0], values[-1], positions, table, *see)
        out = cpu.attend(q, got[0], got[-1], positions, table, (window, chunk), sinks)
        where = f"{b} {t} {heads} {groups} {d} {window} {chunk} {sink} {dtype}"
        np.testing.assert_allclose(out, expected, atol=2e-5, err_msg=where)


def check_rotate():
    rng = RNG(4)
    x = rng.standard_normal((2, 35, 3, 12), np.float32)
    angle = rng.standard_normal((2, 35, 6), np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    scale = rng.standard_normal(36).astype(np.float32)

    def turned(x):
        a, b, c, s = x[..., :6], x[..., 6:], cos[:, :, None], sin[:, :, None]
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    def normed(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-3) * scale

    np.testing.assert_allclose(cpu.rotate(x, cos, sin), turned(x), atol=1e-5)
    got = cpu.rotate(x, cos, sin, jnp.asarray(scale[:12]), 1e-3)
    np.testing.assert_allclose(got, turned(normed(x, scale[:12])), atol=1e-5)
    got = cpu.rotate(x, cos, sin, jnp.asarray(scale), 1e-3)
    want = turned(normed(x.reshape(2, 35, 36), scale).reshape(x.shape))
    np.testing.assert_allclose(got, want, atol=1e-5)


CHECKS = (
    check_linear, check_grouped, check_combined, check_attention, check_one_byte_pages, check_rotate,
)  # fmt: skip


def main() -> None:
    import quantised_kernels  # next to this file, which is run as a program here

    library = build.load(build.build(Path(sys.argv[1]), tuple(sys.argv[2:])))
    for isa in library.isas:
        library.use(isa)
        for check in (*CHECKS, *quantised_kernels.CHECKS):
            check()
        print(isa, flush=True)


if __name__ == "__main__":
    main()
