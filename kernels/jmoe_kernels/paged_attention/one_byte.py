"""Keys and values in one byte a number: each row of a head is codes and one float32 scale.

The scale brings the row's largest magnitude to the largest code, as the row is written. A row with a number
that is not finite has a scale that is not finite, so every query that sees the row sees that.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Shaped

from jmoe_kernels.quantised import DTYPES, as_float

PageCode = Literal["int8", "e4m3"]
LARGEST: dict[PageCode, float] = {"int8": 127.0, "e4m3": 448.0}
SMALLEST = 1e-30  # magnitude of a row up to which its codes are 0, as the inverse of its scale is not finite


def code_of(pages: Shaped[Array, "*P d"]) -> PageCode | None:
    """Returns the code of the numbers in an array of pages, or None if they are not quantised; uint8 is
    "e4m3" (see ``code_storage``)."""
    if pages.dtype == jnp.int8:
        return "int8"
    return "e4m3" if pages.dtype in (jnp.uint8, DTYPES["e4m3"]) else None


def quantise_rows(
    rows: Float[Array, "*B d"], dtype: jnp.dtype
) -> tuple[Shaped[Array, "*B d"], Float[Array, " *B"]]:
    """Returns the codes of each row in the pages' ``dtype``, and its scale."""
    code: PageCode = "int8" if dtype == jnp.int8 else "e4m3"
    rows = rows.astype(jnp.float32)
    most = jnp.max(jnp.abs(rows), axis=-1)
    is_usual = (most > SMALLEST) & jnp.isfinite(most)
    inverse = jnp.where(is_usual, LARGEST[code] / jnp.where(is_usual, most, 1), 0)
    scaled = jnp.where(is_usual[..., None], rows * inverse[..., None], 0)
    scales = most * (1 / LARGEST[code])
    if code == "int8":
        return jnp.round(scaled).astype(jnp.int8), scales
    return saturated(scaled, dtype), scales


def saturated(rows: Float[Array, "*B d"], dtype: jnp.dtype) -> Shaped[Array, "*B d"]:
    """Returns rows as e4m3 without scales; what is beyond its range becomes its largest number, and what is
    not finite a NaN. uint8 pages hold the bits."""
    clipped = jnp.clip(rows, -LARGEST["e4m3"], LARGEST["e4m3"])
    codes = jnp.where(jnp.isfinite(rows), clipped, jnp.nan).astype(DTYPES["e4m3"])
    return lax.bitcast_convert_type(codes, jnp.uint8) if dtype == jnp.uint8 else codes


def numbers_of(rows: Shaped[Array, "*B d"], scales: Float[Array, " *B"] | None) -> Float[Array, "*B d"]:
    """Returns rows of pages as floats: in their own dtype, or in float32 if they are quantised."""
    if code_of(rows) is None:
        return as_float(rows)
    if rows.dtype == jnp.uint8:
        rows = lax.bitcast_convert_type(rows, DTYPES["e4m3"])
    numbers = rows.astype(jnp.float32)
    return numbers if scales is None else numbers * scales[..., None]
