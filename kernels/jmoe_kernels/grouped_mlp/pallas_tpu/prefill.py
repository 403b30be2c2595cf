"""Prefill kernel for many rows per expert: it takes the time of the products.

The grid runs over tiles in row order; a tile is one expert's rows within one block of x and y. Pallas'
pipeline brings the next tile's weights and rows while one is multiplied. A tile multiplies only the row
windows that its group reaches into, so a large block costs no padding. gate, up, activation and down are
fused, so the inner activations never leave VMEM. Consecutive tiles of one block add to the same y in VMEM.
Consecutive tiles of one expert read its weights once if ``inner`` is all of F, else once per block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from jmoe_kernels.grouped_mlp.pallas_tpu.blocks import BlockSizes
from jmoe_kernels.grouped_mlp.pallas_tpu.chunk import fill_zero, over_windows
from jmoe_kernels.grouped_mlp.pallas_tpu.forms import mlp_of, scratch_of
from jmoe_kernels.grouped_mlp.pallas_tpu.operands import Operands, Ref
from jmoe_kernels.settings import Activation


class Tiles(NamedTuple):
    """The work list, prefetched to SMEM.

    expert_T: expert of each tile.
    offset_E: distance from a tile's index to its block's: tile t of expert e is in block ``t + offset_E[e]``.
    start_E: first row of each expert.
    end_E: end of the rows of each expert.
    bounds_C: first tile of each core and the end, ``[cores + 1]``; core c runs tiles
        ``[bounds_C[c], bounds_C[c + 1])``.
    """

    expert_T: Int[Array, " T"]
    offset_E: Int[Array, " E"]
    start_E: Int[Array, " E"]
    end_E: Int[Array, " E"]
    bounds_C: Int[Array, " C"]

    def tile(self, core: Array, i: Array) -> Array:
        """Returns the core's i-th tile, or its last tile again if it has no more, which moves nothing."""
        return jnp.minimum(self.bounds_C[core] + i, self.bounds_C[core + 1] - 1)

    def block(self, t: Array) -> Array:
        """Returns the block of rows of tile ``t``."""
        return t + self.offset_E[self.expert_T[t]]


def _running_sum(n_E: Int[Array, " E"]) -> Int[Array, " E"]:
    """Computes ``cumsum`` as one fused reduction, because XLA's own takes several launches."""
    e = jnp.arange(n_E.shape[0])
    return jnp.sum(jnp.where(e[None, :] <= e[:, None], n_E[None, :], 0), axis=1, dtype=jnp.int32)


def make_tiles(group_sizes_E: Int[Array, " E"], rows: int, block_rows: int, cores: int) -> Tiles:
    """Returns the tiles of ``rows`` rows in blocks of ``block_rows``: at most blocks + experts - 1 of them.

    Blocks that no group reaches belong to the last active expert, whose weights are in VMEM by then; a tile
    without rows zeroes each of them. If no expert is active they are the last expert's, which is then fetched
    and not used. Cores take equal numbers of whole blocks.
    """
    experts, n_blocks = group_sizes_E.shape[0], -(-rows // block_rows)
    e_E = jnp.arange(experts, dtype=jnp.int32)
    active_E = group_sizes_E > 0
    end_E = jnp.minimum(_running_sum(group_sizes_E), rows)
    start_E = jnp.minimum(end_E - group_sizes_E, rows)
    last = jnp.where(jnp.any(active_E), jnp.max(jnp.where(active_E, e_E, 0)), experts - 1)
    first_block_E = start_E // block_rows
    last_block_E = jnp.where(e_E == last, n_blocks - 1, (end_E - 1) // block_rows)
    tiles_E = jnp.where(active_E | (e_E == last), last_block_E - first_block_E + 1, 0)
    tile_end_E = _running_sum(tiles_E)
    t_T = jnp.arange(n_blocks + experts - 1, dtype=jnp.int32)
    core_block_C = jnp.asarray([-(-n_blocks * c // cores) for c in range(cores + 1)], jnp.int32)
    return Tiles(
        expert_T=jnp.minimum(jnp.sum(tile_end_E[None, :] <= t_T[:, None], axis=1, dtype=jnp.int32), last),
        offset_E=first_block_E - tile_end_E + tiles_E,
        start_E=start_E,
        end_E=end_E,
        bounds_C=jnp.sum(
            jnp.clip(core_block_C[:, None] - first_block_E[None, :], 0, tiles_E[None, :]),
            axis=1,
            dtype=jnp.int32,
        ),
    )


def _kernel(*refs: Ref, operands: Operands, blocks: BlockSizes, activation: Activation) -> None:
    n, r, w = len(Tiles._fields), len(operands.rows), len(operands.stacks)
    tiles, (*arrays, y_MD), scratch = Tiles(*refs[:n]), refs[n : n + r + w + 1], list(refs[n + r + w + 1 :])
    core, i, f = (pl.program_id(axis) for axis in range(3))
    t = tiles.tile(core, i)
    e, block = tiles.expert_T[t], tiles.block(t)
    new_block = (i == 0) | (block != tiles.block(jnp.maximum(t - 1, 0)))
    rows = dict(zip(operands.rows, arrays[:r], strict=True))
    chunk = dict(zip(operands.stacks, arrays[r:], strict=True))
    settings = {"blocks": blocks, "activation": activation, "first": f == 0}
    mlp = partial(mlp_of(blocks.form), rows, y_MD, scratch, chunk, **settings)

    @pl.when(tiles.bounds_C[core] + i < tiles.bounds_C[core + 1])
    def _() -> None:
        pl.when(new_block & (f == 0))(lambda: fill_zero(y_MD))
        start = jnp.clip(tiles.start_E[e] - block * blocks.rows, 0, blocks.rows)
        end = jnp.clip(tiles.end_E[e] - block * blocks.rows, 0, blocks.rows)
        pl.when(start < end)(lambda: over_windows(start, end, blocks, mlp))


def prefill(
    operands: Operands,
    group_sizes_E: Int[Array, " E"],
    blocks: BlockSizes,
    *,
    activation: Activation,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "N D"]:
    """Runs rows through their expert's MLP."""
    n, (experts, f, d) = operands.num_rows, operands.dims
    n_blocks, steps = -(-n // blocks.rows), f // blocks.inner
    cores = min(blocks.cores, n_blocks)
    tiles = make_tiles(group_sizes_E, n, blocks.rows, cores)
    most = jnp.max(tiles.bounds_C[1:] - tiles.bounds_C[:-1])

    def rows(core: Array, i: Array, _: Array, *prefetched: Ref) -> tuple[Array, int]:
        tiles = Tiles(*prefetched)
        return tiles.block(tiles.tile(core, i)), 0

    def expert(core: Array, i: Array, _: Array, *prefetched: Ref) -> Array:
        tiles = Tiles(*prefetched)
        return tiles.expert_T[tiles.tile(core, i)]

    def rows_spec(name: str, array: Array) -> pl.BlockSpec:
        return pl.BlockSpec((blocks.rows * (blocks.form.terms if name == "x" else 1), array.shape[1]), rows)

    stacks = operands.stacks.values()
    return pl.pallas_call(
        partial(_kernel, operands=operands, blocks=blocks, activation=activation),
        out_shape=jax.ShapeDtypeStruct((n, d), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tiles),
            grid=(cores, most, steps),
            in_specs=[
                *(rows_spec(*item) for item in operands.rows.items()),
                *(stack.block_spec(steps, expert) for stack in stacks),
            ],
            out_specs=pl.BlockSpec((blocks.rows, d), rows),
            scratch_shapes=scratch_of(blocks, operands.rows["x"].dtype),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=operands.cost(min(experts, n) + n_blocks - 1),
        interpret=interpret,
        name="grouped_mlp_prefill",
    )(*tiles, *operands.rows.values(), *(stack.array for stack in stacks))
