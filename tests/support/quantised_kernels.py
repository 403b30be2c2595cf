"""Checks of the C++ kernels with quantised weights against float64 products, for one instruction set."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jmoe_kernels import cpu
from jmoe_kernels.grouped_mlp import ExpertWeights
from jmoe_kernels.grouped_mlp.cpu import combined_mlp_cpu, grouped_mlp_cpu
from jmoe_kernels.quantised import LAYOUTS, Code, Coding, Quantised, Scales, dequantised
from jmoe_kernels.settings import Activations

RNG = np.random.default_rng
# largest error of a product, relative to the product of the norms of both rows
ERRORS: dict[Activations, float] = {"auto": 5e-5, "int8": 1e-2}
FORMS: tuple[tuple[Scales, bool], ...] = (
    ("float32", False),
    ("float16", True),
    ("bfloat16", True),
    ("uint8", False),
)
CODES: tuple[Code, ...] = ("int8", "e4m3", "int4", "e2m1", "iq4")


def random_weight(coding: Coding, shape: tuple[int, ...], seed: int = 0) -> Quantised:
    """Returns a weight with random codes, all of which occur if it has enough numbers."""
    rng, shapes = RNG(seed), coding.shapes(shape)
    values = rng.integers(0, 256, shapes.values.shape).astype(np.uint8)
    if coding.code == "int8":
        values = values.view(np.int8)
    if coding.code == "e4m3":
        values[(values & 127) == 127] = 3  # a NaN
    if coding.scales == "uint8":
        scales = rng.integers(118, 124, shapes.scales.shape).astype(np.uint8)
    else:
        scales = (rng.uniform(0.5, 1.5, shapes.scales.shape) * 0.02).astype(coding.scales)
    lows = (rng.standard_normal(scales.shape) * 0.1).astype(scales.dtype) if coding.has_lows else None
    return Quantised(values, scales, lows, coding, "float32")


def in_blocks(weight: Quantised) -> Quantised:
    """Returns the weight in the layout "n16", or as it is if it does not fit."""
    fits = LAYOUTS["n16"].fits(weight.coding.code, weight.shape)
    return weight.in_layout("n16") if fits else weight


def on_device(weight: Quantised) -> Quantised:
    return jax.tree.map(jnp.asarray, weight)


def exact(weight: Quantised) -> np.ndarray:
    return dequantised(weight).astype(np.float64)


def check_product(
    x: np.ndarray, weight: Quantised, activations: Activations, where: str, *, is_once: bool = False
) -> None:
    """Checks a product in both layouts, or in blocks alone if ``is_once``."""
    wide, numbers = x.astype(np.float64), exact(weight)
    bound = (
        np.linalg.norm(wide, axis=1)[:, None] * np.linalg.norm(numbers, axis=1)[None] * ERRORS[activations]
    )
    for kept in (in_blocks(weight),) if is_once else (weight, in_blocks(weight)):
        got = np.asarray(cpu.linear(x, on_device(kept), activations), np.float64)
        worst = np.max(np.abs(got - wide @ numbers.T) - bound)
        assert worst <= 0, f"{where}, {kept.layout}, activations {activations}: {worst} above the bound"


SHAPES = (  # rows, inner, out: both sides of every edge of tiles, cut last groups, odd sizes
    (1, 64, 16), (2, 100, 32), (3, 264, 48), (5, 40, 7), (8, 520, 48), (9, 34, 33), (17, 600, 80),
    (70, 96, 16),
)  # fmt: skip


def check_quantised_linear() -> None:
    forms = itertools.product(CODES, (None, 16, 32, 64, 128, 256, 512))
    for i, (code, group) in enumerate(forms):
        for j, activations in enumerate(ERRORS):
            scales, has_lows = FORMS[(i + j) % len(FORMS)]
            m, k, n = SHAPES[(3 * i + j) % len(SHAPES)]
            weight = random_weight(Coding(code, group, scales, has_lows), (n, k), i)
            x = RNG(i).standard_normal((m, k), np.float32)
            check_product(x, weight, activations, f"{weight.coding} {scales}, {m} x {k} x {n}")


def check_rows() -> None:
    """Checks every number of rows from 1 to 70, in whole numbers and in floats."""
    for code, activations, out in (("int8", "auto", 48), ("int4", "int8", 33), ("e4m3", "auto", 48)):
        weight = random_weight(Coding(code, 32, "float16", has_lows=True), (out, 72))
        x = RNG(0).standard_normal((70, 72), np.float32)
        for m in range(1, 71):
            check_product(x[:m], weight, activations, f"{weight.coding}, {m} rows", is_once=True)


def silu_mlp(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gate, up = x @ gate_up[0].T, x @ gate_up[1].T
    return gate / (1 + np.exp(-gate)) * up @ down.T


def poisoned(weight: Quantised, sizes: tuple[int, ...]) -> Quantised:
    """Returns the weight with scales that are NaN for experts without rows, which must not be read."""
    scales = weight.scales.copy()
    scales[np.asarray(sizes) == 0] = 255 if scales.dtype == np.uint8 else np.nan
    return replace(weight, scales=scales)


EXPERTS = (  # group sizes, rows, model, inner, gate and up, down
    ((3, 0, 17, 5), 40, 64, 48, Coding("int8", None), Coding("int8", 16)),
    ((70, 0, 1, 9), 100, 64, 96, Coding("int4", 32, "float16", has_lows=True), Coding("int4", 32)),
    ((1, 1, 1, 1), 4, 100, 36, Coding("e2m1", 32, "uint8"), Coding("int8", 32, "float16")),
    ((0, 0, 0, 0), 8, 32, 32, Coding("iq4", 32), Coding("e4m3", 32)),
    ((130, 64, 65, 8), 300, 136, 72, Coding("e4m3", 128), Coding("e4m3", None)),
)  # fmt: skip


def check_quantised_experts() -> None:
    """Checks rows of experts and combined tokens; down is also a plain weight once."""
    for i, (sizes, n, d, f, up_coding, down_coding) in enumerate(EXPERTS):
        e, used, rng = len(sizes), sum(sizes), RNG(i)
        gate_up = random_weight(up_coding, (e, 2, f, d), i)
        down = random_weight(down_coding, (e, d, f), i + 1)
        x = rng.standard_normal((n, d), np.float32)
        x[used:] = np.nan  # rows past the last group belong to no expert
        ends = np.cumsum(sizes)
        want, wide = np.zeros((n, d)), np.nan_to_num(x).astype(np.float64)
        for expert, end in enumerate(ends):
            rows = slice(end - sizes[expert], end)
            want[rows] = silu_mlp(wide[rows], exact(gate_up[expert]), exact(down[expert]))
        counts, scale = jnp.asarray(sizes, jnp.int32), max(float(np.sqrt(np.mean(want**2))), 1e-9)
        for activations, kept in itertools.product(ERRORS, (lambda w: w, in_blocks)):
            weights = [on_device(kept(poisoned(w, sizes))) for w in (gate_up, down)]
            got = grouped_mlp_cpu(x, ExpertWeights(*weights), counts, "silu", activations)
            error = np.abs(np.asarray(got, np.float64) - want).max() / scale
            where = f"{sizes} {up_coding} / {down_coding}, {activations}"
            # three products, whose errors add up; the largest of many against the mean
            assert error < ERRORS[activations] * 30, f"{where}: {error}"
            assert not np.asarray(got)[used:].any(), where
            plain = ExpertWeights(weights[0], jnp.asarray(exact(down), jnp.float32))
            mixed = grouped_mlp_cpu(x, plain, counts, "silu", activations)
            assert np.abs(np.asarray(mixed) - want).max() / scale < ERRORS[activations] * 30, where
            order = jnp.arange(n, dtype=jnp.int32)
            args = (jnp.ones((n, 1)), order, ExpertWeights(*weights), counts, "silu", activations)
            np.testing.assert_allclose(combined_mlp_cpu(x, *args), got, rtol=1e-6, err_msg=where)


def check_extremes() -> None:
    """Checks sums of the largest whole numbers, denormal scales and codes, and rows without a scale."""
    for code, k in itertools.product(CODES, (256, 512, 4096)):
        coding = Coding(code, None)
        weight = random_weight(coding, (16, k))
        worst = {"int8": -128, "e4m3": 0xFE, "int4": 0x00, "e2m1": 0xFF, "iq4": 0x00}[code]
        weight = replace(
            weight, values=np.full_like(weight.values, worst), scales=np.ones_like(weight.scales)
        )
        for activations, sign in itertools.product(ERRORS, (1, -1)):
            x = np.full((9, k), sign * 3.0, np.float32)  # every number is the row's largest
            check_product(x, weight, activations, f"largest {code}, {k} columns")
            got = np.asarray(cpu.linear(x, on_device(in_blocks(weight)), activations))
            np.testing.assert_allclose(got, x @ dequantised(weight).T, rtol=1e-4, err_msg=code)
    tiny = np.arange(256, dtype=np.uint8)
    tiny[(tiny & 127) == 127] = 0
    codes = Quantised(
        np.tile(tiny, (16, 1)), np.ones((16, 1), np.float32), None, Coding("e4m3", None), "float32"
    )
    one_each = np.eye(256, dtype=np.float32)
    np.testing.assert_array_equal(cpu.linear(one_each, on_device(in_blocks(codes))), dequantised(codes).T)
    for scale, dtype in ((np.float16(6e-8), "float16"), (np.uint8(1), "uint8"), (np.uint8(3), "uint8")):
        coding = Coding("int4", 32, dtype)
        weight = random_weight(coding, (16, 64))
        weight = replace(weight, scales=np.full_like(weight.scales, scale))
        x = RNG(0).standard_normal((3, 64), np.float32) * np.float32(1e3)
        check_product(x, weight, "auto", f"scales {scale}")
    weight = random_weight(Coding("int8", 32, has_lows=True), (16, 64))
    for activations in ERRORS:
        zero = cpu.linear(np.zeros((10, 64), np.float32), on_device(in_blocks(weight)), activations)
        np.testing.assert_array_equal(zero, 0)
        bad = np.ones((10, 64), np.float32)
        bad[3, 5] = np.nan
        got = np.asarray(cpu.linear(bad, on_device(in_blocks(weight)), activations))
        assert np.isnan(got[3]).all() and np.isfinite(np.delete(got, 3, axis=0)).all()


CHECKS = (check_quantised_linear, check_rows, check_quantised_experts, check_extremes)
