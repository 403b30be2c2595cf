"""The ragged exchange of rows: ``lax.ragged_all_to_all``, and an emulation of it for CPUs.

XLA:CPU does not implement the collective. The emulation has the same signature and contract, so that all of
a transport's offset arithmetic runs, and is tested, on emulated devices. It gathers every rank's rows, so it
does not save traffic.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int, Shaped
from jmoe_kernels.backends import get_backend

# (operand, output, input_offsets, send_sizes, output_offsets, recv_sizes) -> output with the rows received
Exchange = Callable[[Array, Array, Array, Array, Array, Array], Array]


def get_exchange(platform: str, axis_name: str) -> Exchange:
    """The exchange along ``axis_name`` for devices of ``platform``; inside ``shard_map`` only."""
    has_own = get_backend(platform).has_ragged_exchange
    run = lax.ragged_all_to_all if has_own else emulated_ragged_all_to_all
    return partial(run, axis_name=axis_name)


def starts(sizes: Int[Array, "*N"], axis: int) -> Int[Array, "*N"]:
    """The start of each of the consecutive groups of ``sizes`` along ``axis``."""
    return jnp.cumsum(sizes, axis=axis, dtype=jnp.int32) - sizes


def emulated_ragged_all_to_all(
    operand: Shaped[Array, "N *D"],
    output: Shaped[Array, "M *D"],
    input_offsets: Int[Array, " I"],
    send_sizes: Int[Array, " I"],
    output_offsets: Int[Array, " I"],
    recv_sizes: Int[Array, " I"],
    *,
    axis_name: str,
) -> Shaped[Array, "M *D"]:
    """``output`` with the received slices written into it: ``lax.ragged_all_to_all`` on any platform.

    The I slices of a rank are I / R for each rank in turn: slice i is ``send_sizes[i]`` rows of ``operand``
    from ``input_offsets[i]``, and lands at row ``output_offsets[i]`` of its receiver's ``output``.
    ``recv_sizes``: sizes in rows of the arriving slices, by sender. If slices overlap, the last slice wins.
    """
    del send_sizes  # the receivers' sizes say the same
    arriving = partial(lax.all_to_all, axis_name=axis_name, split_axis=0, concat_axis=0, tiled=True)
    from_I, to_I = arriving(input_offsets), arriving(output_offsets)
    slices = from_I.shape[0]
    each = slices // lax.axis_size(axis_name)
    all_rows = lax.all_gather(operand, axis_name, tiled=True)
    first_I = jnp.arange(slices) // each * operand.shape[0] + from_I  # in all_rows

    row_M = jnp.arange(output.shape[0])
    covers_IM = (row_M[None] >= to_I[:, None]) & (row_M[None] < (to_I + recv_sizes)[:, None])
    slice_M = jnp.max(jnp.where(covers_IM, jnp.arange(slices)[:, None], -1), axis=0)
    received = all_rows.at[first_I[slice_M] + row_M - to_I[slice_M]].get(mode="fill", fill_value=0)
    is_new = (slice_M >= 0).reshape(-1, *(1,) * (output.ndim - 1))
    return jnp.where(is_new, received, output)
