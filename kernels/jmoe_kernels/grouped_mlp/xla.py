"""Grouped MLP in portable XLA: a loop over tiles of rows, each tile reading one expert's weights.

Rows arrive sorted by expert, so a tile is a contiguous slice. A tile that runs past its expert's last row
writes garbage there, which the next tile of the next expert overwrites, because tiles run in row order; rows
past the last group are zeroed at the end. Experts without rows have no tile, so they are never read.

bfloat16 weights must come as uint16 (``storage_dtype``): XLA:CPU otherwise legalises the slice of a bfloat16
stack as convert-slice-convert and hoists the conversion of *all* experts out of the loop (143 ms instead of 5
ms per layer of OLMoE's size). A quantised expert is dequantised after its slice, for the same reason.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jmoe_kernels.grouped_mlp.types import ExpertWeights, gated
from jmoe_kernels.matmul import dot_nt
from jmoe_kernels.quantised import Weight, as_float
from jmoe_kernels.settings import Activation


def tile_rows(rows: int, experts: int) -> int:
    """Returns the rows of a tile: few if experts get few rows each (decode), 96 if they get many (prefill).

    A layer of 512 tokens and 64 experts top-8 (64 rows per expert) took 98 ms with 64 rows per tile, 74 ms
    with 96, and 82 ms with 128, since most experts then fit one tile.
    """
    if rows >= 32 * experts:
        return 96
    return 16 if rows >= 16 * experts else 8


def grouped_mlp_xla(
    x_ND: Float[Array, "N D"],
    weights: ExpertWeights,
    group_sizes_E: Int[Array, " E"],
    activation: Activation = "silu",
) -> Float[Array, "N D"]:
    """Computes ``down(act(gate x) * up x)`` of rows sorted by expert; rows past the last group are zero."""
    n, d = x_ND.shape
    experts, f, _ = weights.dims
    tile = tile_rows(n, experts)
    ends_E = jnp.cumsum(group_sizes_E)
    tiles_E = (group_sizes_E + tile - 1) // tile
    tile_ends_E = jnp.cumsum(tiles_E)
    expert_of_tile = jnp.searchsorted(
        tile_ends_E, jnp.arange(min(n, n // tile + experts)), side="right"
    ).astype(jnp.int32)
    first_tile_E = tile_ends_E - tiles_E
    x_pad = jnp.pad(x_ND.astype(weights.dtype), ((0, tile), (0, 0)))

    def expert_matrix(stack: Weight, e: Array) -> Array:
        return as_float(jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, e, keepdims=False), stack))

    def one_tile(i: Array, y_pad: Array) -> Array:
        e = expert_of_tile[i]
        row = ends_E[e] - group_sizes_E[e] + (i - first_tile_E[e]) * tile
        x = lax.dynamic_slice_in_dim(x_pad, row, tile)
        h = dot_nt(x, expert_matrix(weights.gate_up_E2FD, e).reshape(2 * f, d))
        if weights.gate_up_bias_E2F is not None:
            h = h + expert_matrix(weights.gate_up_bias_E2F, e).reshape(1, 2 * f).astype(jnp.float32)
        h = gated(activation, h[:, :f], h[:, f:])
        y = dot_nt(h.astype(weights.dtype), expert_matrix(weights.down_EDF, e))
        if weights.down_bias_ED is not None:
            y = y + expert_matrix(weights.down_bias_ED, e)[None].astype(jnp.float32)
        return lax.dynamic_update_slice_in_dim(y_pad, y, row, 0)

    y_pad = jnp.zeros((n + tile, d), jnp.float32)
    y_ND = lax.fori_loop(0, tile_ends_E[-1], one_tile, y_pad)[:n]
    return jnp.where((jnp.arange(n) < ends_E[-1])[:, None], y_ND, 0.0)
