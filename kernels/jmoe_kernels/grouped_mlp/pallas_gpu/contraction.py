"""The loop of the decode kernels: weight tiles times rows of a window, step by step through shared memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe_kernels.grouped_mlp.pallas_gpu.blocks import ACC
from jmoe_kernels.grouped_mlp.pallas_gpu.factor import Factor, Parts, along_rows
from jmoe_kernels.quantised.tiles import TILE


def contracted(
    factor: Factor, weights: list[list[Any]], tile: Any, rows: Any, stages: int, interpret: bool
) -> tuple[Array, ...]:
    """Returns the sums ``[64, rows]`` of each weight's tile times the rows of a window, in float32.

    weights: for each weight the references of ``Factor.sources``.
    rows: the rows ``[rows, depth]`` in device memory.
    stages: number of steps in flight.
    interpret: whether the interpreter runs it.
    """
    count = len(factor.specs(tile))

    def pipeline(body: Callable, **carry: Any) -> Any:
        row_spec = plgpu.BlockSpec((factor.rows, factor.step), lambda k: (0, k))
        return plgpu.emit_pipeline(
            body,
            grid=(factor.depth // factor.step,),
            in_specs=[row_spec, *factor.specs(tile) * len(weights)],
            max_concurrent_steps=stages,
            **carry,
        )(rows, *[reference for references in weights for reference in references])

    def split(blocks: tuple) -> list[Parts]:
        return [tuple(blocks[i : i + count]) for i in range(0, count * len(weights), count)]

    def by_group(multiply: Callable) -> tuple[Array, ...]:
        def contract(_, rows_s, *rest):
            *blocks, totals = rest
            return tuple(
                _add_groups(factor, tiles, total, partial(multiply, rows_s))
                for tiles, total in zip(split(tuple(blocks)), totals, strict=True)
            )

        zeros = jnp.zeros((TILE, factor.rows), jnp.float32)
        if not interpret:
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        return pipeline(contract, init_carry=(zeros,) * len(weights))

    def at_once(multiply: Callable) -> tuple[Array, ...]:
        def accumulate(*accs):
            def contract(_, rows_s, *blocks):
                for acc, tiles in zip(accs, split(blocks), strict=True):
                    for start, numbers in factor.pieces(tiles):
                        multiply(rows_s, acc, numbers, start)
                plgpu.wgmma_wait(0)

            pipeline(contract)
            return tuple(acc[...].astype(jnp.float32) for acc in accs)

        return pl.run_scoped(accumulate, *[ACC((TILE, factor.rows), factor.sums_dtype)] * len(weights))

    run = by_group if factor.is_summed_by_group else at_once
    if not interpret:
        return run(partial(_multiply, factor))
    spares = plgpu.SMEM((TILE, factor.piece), rows.dtype), plgpu.SMEM((factor.piece, factor.rows), rows.dtype)
    return pl.run_scoped(lambda *spares: run(partial(_multiply_interpreted, factor, spares)), *spares)


def _multiply(factor: Factor, rows_s: Any, acc: Any, numbers: Any, start: int) -> None:
    """Adds a piece of a weight's tile times the same numbers of all rows to the sums; it does not wait."""
    is_whole = factor.piece == factor.step
    plgpu.wgmma(acc, numbers, (rows_s if is_whole else rows_s.at[:, pl.ds(start, factor.piece)]).T)


def _multiply_interpreted(
    factor: Factor, spares: tuple, rows_s: Any, acc: Any, numbers: Any, start: int
) -> None:
    """Does ``_multiply`` with factors in shared memory that are not transposed: jax 0.10's interpreter takes
    no others."""
    spare, transpose = spares
    spare[...] = numbers[...]
    transpose[...] = rows_s[...].T[start : start + factor.piece]
    plgpu.commit_smem()
    plgpu.wgmma(acc, spare, transpose)
    plgpu.wgmma_wait(0)


def _add_groups(factor: Factor, tiles: Parts, total: Array, multiply: Callable) -> Array:
    """Returns the sums after a step: the sum of each group, scaled, is added."""
    for i, (start, numbers) in enumerate(factor.pieces(tiles)):

        def sums(acc, numbers=numbers, start=start):
            multiply(acc, numbers, start)
            plgpu.wgmma_wait(0)
            return acc[...].astype(jnp.float32)

        part = pl.run_scoped(sums, ACC((TILE, factor.rows), factor.sums_dtype))
        total = total + part * along_rows(factor.scale(tiles[1][i]), part.shape)
    return total


def times_units(sums: Array, units: Any) -> Array:
    """Returns sums ``[64, rows]`` times the units of ``factor.rounded`` in device memory."""

    def load(units_s, barrier):
        plgpu.copy_gmem_to_smem(units, units_s, barrier)
        plgpu.barrier_wait(barrier)
        return sums * lax.broadcast_in_dim(units_s[...], sums.shape, (1,))

    return pl.run_scoped(load, plgpu.SMEM(units.shape, jnp.float32), plgpu.Barrier())
