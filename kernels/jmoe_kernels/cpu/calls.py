"""The C++ dense products and attention as jax functions; ``get_library()`` must have loaded them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Shaped

from jmoe_kernels.quantised import Coding, Quantised, Weight
from jmoe_kernels.settings import Activations

# [P, G, S, d]: float32, or bfloat16 (also stored as uint16), or with the scales [P, G, S] int8 or e4m3 (also
# stored as uint8)
Pages = Array | tuple[Array, Array]
CODES = ("int8", "e4m3", "int4", "e2m1", "iq4")  # from 1 on, as isa.h numbers them
SCALES = ("float32", "bfloat16", "float16", "uint8")
UNIT = 256  # columns that the kernels add up as integers at most


def call(target: str, shape: tuple[int, ...], *args: Array, **attributes: int | float) -> Array:
    """Runs a kernel that ``load`` registered and returns its float32 result.

    attributes: numbers that become int64 or float32 attributes of the kernel.
    """
    run = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, jnp.float32))
    values = {n: np.int64(v) if isinstance(v, int) else np.float32(v) for n, v in attributes.items()}
    return run(*args, **values)


def linear(
    x_MK: Float[Array, "M K"], w_NK: Shaped[Array, "N K"] | Quantised, activations: Activations = "auto"
) -> Float[Array, "M N"]:
    """Returns ``x @ w.T`` in float32.

    w_NK: float32; bfloat16 (also stored as uint16), to which x is then rounded; or quantised (see ``limit``).
    activations: what x is rounded to for a quantised weight.
    """
    shape = x_MK.shape[0], w_NK.shape[0]
    values, rest, form = operands(w_NK, activations)
    return call("jmoe_linear", shape, x_MK, values, *rest, form=form)


def limit(coding: Coding) -> str | None:
    """Returns why the kernels cannot take weights with this coding, or None if they can."""
    group = coding.group
    if group is None or (group % 16 == 0 and (UNIT % group == 0 or group % UNIT == 0)):
        return None
    return f"weights are quantised ({coding}); the kernel takes groups of 16, 32, 64, 128 or multiples of 256"


def operands(weight: Weight, activations: Activations) -> tuple[Array, tuple[Array, ...], int]:
    """Returns the values of a weight, its scales and lows, and its form as ``src/weight.h`` reads it."""
    if not isinstance(weight, Quantised):
        return weight, (), 0
    coding = weight.coding
    form = CODES.index(coding.code) + 1 | SCALES.index(coding.scales) << 4 | coding.has_lows << 8
    form |= (weight.layout == "n16") << 9 | (activations == "int8") << 10 | (weight.dtype == "bfloat16") << 11
    form |= (coding.group or 0) << 16
    rest = (weight.scales,) if weight.lows is None else (weight.scales, weight.lows)
    return weight.values, rest, form


def attend(
    q_BTHd: Float[Array, "B T H d"],
    k: Pages,
    v: Pages,
    positions_BT: Int[Array, "B T"],
    table_BM: Int[Array, "B M"],
    span: tuple[int | None, int | None] = (None, None),
    sinks_H: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H d"]:
    """Returns each query's float32 attention to the paged keys up to its position, in its window or chunk.

    A padding query (position -1) gives zeros. Latent pages are keys and values at once, and are passed as
    both. span: the window and the chunk.
    """
    window, chunk = span
    none = jnp.zeros((0,), jnp.float32)
    (k_PGSd, k_PGS), (v_PGSd, v_PGS) = (kept if isinstance(kept, tuple) else (kept, none) for kept in (k, v))
    sinks = none if sinks_H is None else sinks_H.astype(jnp.float32)
    args = (q_BTHd, k_PGSd, v_PGSd, k_PGS, v_PGS, positions_BT, table_BM, sinks)
    return call("jmoe_attend", q_BTHd.shape, *args, window=window or 0, chunk=chunk or 0)


def write_pages(
    k: Pages,
    v: Pages,
    k_BTGd: Float[Array, "B T G d"],
    v_BTGd: Float[Array, "B T G d"],
    positions_BT: Int[Array, "B T"],
    table_BM: Int[Array, "B M"],
) -> tuple[Pages, Pages]:
    """Returns the pages with the new keys and values at their positions, written in place.

    Position -1 writes nothing.
    """
    written_k, written_v = _write((k, v), (k_BTGd, v_BTGd), positions_BT, table_BM)
    return written_k, written_v


def write_latent(
    pages: Pages,
    rows_BTGd: Float[Array, "B T G d"],
    positions_BT: Int[Array, "B T"],
    table_BM: Int[Array, "B M"],
) -> Pages:
    """Returns the latent pages with the new rows at their positions, written in place.

    Position -1 writes nothing.
    """
    [written] = _write((pages,), (rows_BTGd,), positions_BT, table_BM)
    return written


def _write(pages: tuple[Pages, ...], rows: tuple[Array, ...], *address: Array) -> tuple[Pages, ...]:
    """Writes the rows of every array of pages. The kernel takes all arrays of pages, then all scales."""
    has_scales = isinstance(pages[0], tuple)
    arrays: list[Any] = [a for each in zip(*pages, strict=True) for a in each] if has_scales else list(pages)
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    before = len(address) + len(rows)
    aliases = {before + i: i for i in range(len(arrays))}
    run = jax.ffi.ffi_call("jmoe_write_pages", results, input_output_aliases=aliases)
    written = run(*address, *rows, *arrays)
    n = len(pages)
    return tuple(zip(written[:n], written[n:], strict=True)) if has_scales else tuple(written)


def rotate(
    x_BTHd: Float[Array, "B T H d"],
    cos_BTh: Float[Array, "B T h"],
    sin_BTh: Float[Array, "B T h"],
    scale: Float[Array, " S"] | None = None,
    eps: float = 0.0,
) -> Float[Array, "B T H d"]:
    """Rotates ``x_BTHd`` by its positions' angles (h = d / 2); normalises it first if there is a ``scale``.

    scale: ``[d]`` for an RMS norm over each head, ``[H * d]`` for one over all heads of a token.
    eps: number that the norm adds to the mean square.
    """
    scale = jnp.zeros((0,), jnp.float32) if scale is None else scale.astype(jnp.float32)
    return call("jmoe_rotate", x_BTHd.shape, x_BTHd, cos_BTh, sin_BTh, scale, eps=float(eps))
