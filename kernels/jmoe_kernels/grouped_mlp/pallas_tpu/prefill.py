"""Prefill kernel: many rows per expert, so the time is that of the products.

The grid runs over tiles, a tile being one expert's rows within one block of x and y, in row order. Pallas'
pipeline brings the next tile's weights and rows while one is multiplied. A tile multiplies only the row
windows that its group reaches into, so a large block costs no padding. gate, up, activation and down are
fused: the inner activations never leave VMEM. Consecutive tiles of one block add to the same y in VMEM;
consecutive tiles of one expert read its weights once where ``inner`` is all of F, else once per block.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from jmoe_kernels.grouped_mlp.pallas_tpu.blocks import Blocks
from jmoe_kernels.grouped_mlp.pallas_tpu.decode import Ref, add_rows, chunk_mlp, cost, fill_zero
from jmoe_kernels.grouped_mlp.types import Activation


class Tiles(NamedTuple):
    """The work list; every array is prefetched to SMEM.

    expert, block, start, end: of each tile, its weights, its block of rows and its rows within that block.
    first: 1 where the tile is the first of its block. bounds: [cores + 1], core c runs
    tiles [bounds[c], bounds[c + 1]).
    """

    expert_T: Int[Array, " T"]
    block_T: Int[Array, " T"]
    start_T: Int[Array, " T"]
    end_T: Int[Array, " T"]
    first_T: Int[Array, " T"]
    bounds_C: Int[Array, " C"]


def make_tiles(group_sizes_E: Int[Array, " E"], rows: int, block_rows: int, cores: int) -> Tiles:
    """The tiles of ``rows`` rows in blocks of ``block_rows``: at most blocks + experts - 1 of them.

    A block that no group reaches has one tile without rows, which zeroes it; it names the last active expert,
    whose weights are in VMEM already. Cores take equal numbers of whole blocks.
    """
    experts, n_blocks = group_sizes_E.shape[0], -(-rows // block_rows)
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E), rows)
    starts_E = ends_E - group_sizes_E
    # one more group, without rows, spans the blocks past the last row
    used = -(-ends_E[-1:] // block_rows)
    first_block_G = jnp.concatenate([starts_E // block_rows, used])
    last_block_G = jnp.concatenate([(ends_E - 1) // block_rows, jnp.full(1, n_blocks - 1, jnp.int32)])
    tiles_E = jnp.where(group_sizes_E > 0, last_block_G[:-1] - first_block_G[:-1] + 1, 0)
    tiles_G = jnp.concatenate([tiles_E, n_blocks - used])
    tile_ends_G = jnp.cumsum(tiles_G)
    t_T = jnp.arange(n_blocks + experts - 1, dtype=jnp.int32)
    group_T = jnp.sum((tile_ends_G[None, :] <= t_T[:, None]).astype(jnp.int32), axis=1)
    group_T = jnp.minimum(group_T, experts)  # tiles past the last one: never run
    block_T = jnp.minimum((first_block_G - tile_ends_G + tiles_G)[group_T] + t_T, n_blocks - 1)
    row_T = block_T * block_rows
    starts_G = jnp.concatenate([starts_E, jnp.zeros(1, jnp.int32)])
    ends_G = jnp.concatenate([ends_E, jnp.zeros(1, jnp.int32)])
    last_active = jnp.max(jnp.where(group_sizes_E > 0, jnp.arange(experts, dtype=jnp.int32), 0))
    before_C = jnp.asarray([-(-n_blocks * c // cores) for c in range(1, cores + 1)], jnp.int32)
    running_T = t_T < tile_ends_G[-1]
    return Tiles(
        expert_T=jnp.where(group_T == experts, last_active, group_T),
        block_T=block_T,
        start_T=jnp.clip(starts_G[group_T] - row_T, 0, block_rows),
        end_T=jnp.clip(ends_G[group_T] - row_T, 0, block_rows),
        first_T=jnp.concatenate([jnp.ones(1, jnp.int32), (block_T[1:] != block_T[:-1]).astype(jnp.int32)]),
        bounds_C=jnp.concatenate(
            [
                jnp.zeros(1, jnp.int32),
                jnp.sum((running_T[None] & (block_T[None] < before_C[:, None])).astype(jnp.int32), axis=1),
            ]
        ),
    )


def _tile(core: Array, i: Array, tiles: Tiles) -> Array:
    """The core's i-th tile; past its last one, that last one again, which moves nothing."""
    return jnp.minimum(tiles.bounds_C[core] + i, tiles.bounds_C[core + 1] - 1)


def _kernel(*refs: Ref, names: tuple[str, ...], blocks: Blocks, activation: Activation) -> None:
    tiles, (x_MD, *weights, y_MD) = Tiles(*refs[:6]), refs[6:]
    core, i, f = (pl.program_id(axis) for axis in range(3))
    t = _tile(core, i, tiles)

    @pl.when(tiles.bounds_C[core] + i < tiles.bounds_C[core + 1])
    def _() -> None:
        pl.when((tiles.first_T[t] == 1) & (f == 0))(lambda: fill_zero(y_MD))
        chunk = dict(zip(names, weights, strict=True))
        mlp = partial(chunk_mlp, chunk=chunk, activation=activation, first=f == 0)
        add_rows(x_MD, y_MD, tiles.start_T[t], tiles.end_T[t], blocks.windows, mlp)


def prefill(
    x_ND: Float[Array, "N D"],
    operands: Mapping[str, Array],
    group_sizes_E: Int[Array, " E"],
    blocks: Blocks,
    *,
    activation: Activation,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "N D"]:
    """Rows through their expert's MLP. ``operands``: the weights by stream name, biases as [E,2,F], [E,1,D]."""
    n, d = x_ND.shape
    experts, _, f, _ = operands["gate_up"].shape
    n_blocks = -(-n // blocks.rows)
    cores = min(blocks.cores, n_blocks)
    tiles = make_tiles(group_sizes_E, n, blocks.rows, cores)
    steps = jnp.max(tiles.bounds_C[1:] - tiles.bounds_C[:-1])

    def rows(core: Array, i: Array, _: Array, *prefetched: Ref) -> tuple[Array, int]:
        tiles = Tiles(*prefetched)
        return tiles.block_T[_tile(core, i, tiles)], 0

    def expert(core: Array, i: Array, _: Array, *prefetched: Ref) -> Array:
        tiles = Tiles(*prefetched)
        return tiles.expert_T[_tile(core, i, tiles)]

    specs = {
        "gate_up": pl.BlockSpec((None, 2, blocks.inner, d), lambda c, i, j, *p: (expert(c, i, j, *p), 0, j, 0)),
        "down": pl.BlockSpec((None, d, blocks.inner), lambda c, i, j, *p: (expert(c, i, j, *p), 0, j)),
        "gate_up_bias": pl.BlockSpec((None, 2, blocks.inner), lambda c, i, j, *p: (expert(c, i, j, *p), 0, j)),
        "down_bias": pl.BlockSpec((None, 1, d), lambda c, i, j, *p: (expert(c, i, j, *p), 0, 0)),
    }
    return pl.pallas_call(
        partial(_kernel, names=tuple(operands), blocks=blocks, activation=activation),
        out_shape=jax.ShapeDtypeStruct((n, d), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tiles),
            grid=(cores, steps, f // blocks.inner),
            in_specs=[pl.BlockSpec((blocks.rows, d), rows), *(specs[name] for name in operands)],
            out_specs=pl.BlockSpec((blocks.rows, d), rows),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=cost(n, operands, min(experts, n) + n_blocks - 1),
        interpret=interpret,
        name="grouped_mlp_prefill",
    )(*tiles, x_ND, *operands.values())
