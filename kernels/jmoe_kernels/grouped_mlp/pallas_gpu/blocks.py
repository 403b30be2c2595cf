"""Block sizes by device, dtype and rows per expert, and the map from windows of rows to experts.

A window is ``BlockSizes.rows`` consecutive rows of which some or all belong to one expert: both kernels work
on one window at a time. Windows start at their expert's first row rounded down to ALIGN, not at multiples of
the window, so that an expert with few rows is read once. The last windows start early, still inside x,
because padding x would copy it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Int

from jmoe_kernels.grouped_mlp.types import ExpertCodings
from jmoe_kernels.quantised import Coding
from jmoe_kernels.quantised.tiles import TILE

ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
SMEM_LIMIT = 227 * 1024  # a thread block's limit on sm_90
ALIGN = 8  # rows: TMA addresses a swizzled tile by whole groups of 8 rows
WIDE = 8  # windows that use a weight tile one after another in the prefill kernels
IDLE, EXPERT, ROW, SKIP, ROWS = -1, 0, 1, 2, 3  # columns of ``windows``


@dataclass(frozen=True)
class BlockSizes:
    """Tile sizes of one kernel pair.

    kernel: name of the pair.
    rows: number of rows of a window.
    inner: number of gate (and up) rows that a thread block of the first kernel computes; TILE in "decode".
    model: number of output columns that a thread block of the second kernel computes; TILE in "decode".
    k_up: step of the contraction of the first kernel.
    k_down: step of the contraction of the second kernel.
    stages_up: number of steps in flight in the first kernel.
    stages_down: number of steps in flight in the second kernel.
    sms: number of thread blocks of the persistent prefill kernels.
    bytes_up: bytes of a number of the first kernel's weights, with its share of scales and lows.
    bytes_down: bytes of a number of the second kernel's weights, likewise.
    """

    kernel: Literal["decode", "prefill"]
    rows: int
    inner: int
    model: int
    k_up: int
    k_down: int
    stages_up: int
    stages_down: int
    sms: int = 132
    bytes_up: float = 2
    bytes_down: float = 2

    def smem(self) -> tuple[int, int]:
        """Returns the bytes of shared memory of the two kernels: steps in flight and the tile to store."""
        up = self._in_flight(self.stages_up, self.k_up, 2 * self.inner, self.bytes_up)
        down = self._in_flight(self.stages_down, self.k_down, self.model, self.bytes_down)
        if self.kernel == "decode":
            return up + self.rows * self.inner * 2, down + self.rows * self.model * 4
        return up + self.rows * STORE_BYTES, down + self.rows * STORE_BYTES

    def _in_flight(self, stages: int, step: int, weight_rows: int, number_bytes: float) -> int:
        return stages * int(step * (weight_rows * number_bytes + self.rows * 2))


STORE_BYTES = 128  # bytes of a row that the prefill kernels stage at a time

# Decode wants bytes in flight: 64-row weight tiles (the least that wgmma takes) leave room for two or three
# thread blocks per SM with about 64 KiB of weights in flight each. Prefill wants few loads per product: tiles
# of 128 x 256 in one thread block of two computing warpgroups.
_HOPPER = {
    "rows<=4": BlockSizes("decode", 16, 64, 64, 64, 64, 4, 6),
    "rows<=12": BlockSizes("decode", 32, 64, 64, 64, 64, 4, 6),
    "rows<=64": BlockSizes("decode", 64, 64, 64, 64, 64, 4, 6),
    "prefill": BlockSizes("prefill", 128, 128, 256, 64, 64, 4, 4),
}
# Quantised weights have one kernel pair, whose windows are as wide as registers allow. Few rows want steps
# twice as long, because a step has half the bytes or a quarter. Many rows fill registers and shared memory:
# short steps leave room for two thread blocks per SM, of which one decodes while the other multiplies.
_HOPPER_CODES = {
    "rows<=4": BlockSizes("decode", 16, 64, 64, 128, 128, 4, 6),
    "rows<=12": BlockSizes("decode", 32, 64, 64, 128, 128, 4, 6),
    "rows<=64": BlockSizes("decode", 64, 64, 64, 128, 128, 3, 4),
    "prefill": BlockSizes("decode", 128, 64, 64, 64, 64, 4, 4),
}
DtypeOrCodes = Literal["bfloat16", "codes"]
_BLOCKS: dict[DtypeOrCodes, dict[str, BlockSizes]] = {"bfloat16": _HOPPER, "codes": _HOPPER_CODES}
TABLE: dict[tuple[str, DtypeOrCodes], dict[str, BlockSizes]] = {
    (device, kind): blocks
    for device in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "default")
    for kind, blocks in _BLOCKS.items()
}


def bucket(rows: int, experts: int) -> str:
    """Returns the table's key for ``rows`` rows over ``experts`` experts.

    Both numbers are known when the kernel is traced; group sizes are not.
    """
    for limit in (4, 12, 64):
        if rows <= limit * experts:
            return f"rows<={limit}"
    return "prefill"


def _divide(block: int, size: int) -> int:
    """Returns the largest multiple of 64 up to ``block`` that divides ``size``."""
    return max(b for b in range(64, block + 1, 64) if size % b == 0)


def choose_blocks(rows: int, experts: int, device_kind: str, kind: DtypeOrCodes = "bfloat16") -> BlockSizes:
    """Returns the table's blocks for this device and shape, and for bfloat16 or quantised weights."""
    return TABLE.get((device_kind, kind), TABLE["default", kind])[bucket(rows, experts)]


def fit_blocks(
    blocks: BlockSizes, inner: int, model: int, codings: ExpertCodings = (None, None)
) -> BlockSizes:
    """Returns ``blocks`` cut to divide the dimensions, with no more stages than steps.

    codings: how the weights of both kernels are stored; a step of the contraction has whole groups or is a
        part of one.
    """
    k_up, k_down = _step(blocks.k_up, model, codings[0]), _step(blocks.k_down, inner, codings[1])
    return dataclasses.replace(
        blocks,
        inner=_divide(blocks.inner, inner),
        model=_divide(blocks.model, model),
        k_up=k_up,
        k_down=k_down,
        stages_up=min(blocks.stages_up, model // k_up),
        stages_down=min(blocks.stages_down, inner // k_down),
        bytes_up=_number_bytes(codings[0], model),
        bytes_down=_number_bytes(codings[1], inner),
    )


def _step(step: int, depth: int, coding: Coding | None) -> int:
    """Returns the largest step up to ``step`` that divides ``depth``, with whole groups or in one group."""
    if coding is None or coding.group is None or coding.group >= depth:
        return _divide(step, depth)
    whole = _divide(step, depth)
    return whole if whole % coding.group == 0 or coding.group % whole == 0 else TILE


def _number_bytes(coding: Coding | None, depth: int) -> float:
    return 2 if coding is None else coding.nbytes((1, TILE, depth), "tiles") / (TILE * depth)


def window_count(rows: int, experts: int, tile: int) -> int:
    """Returns the number of slots for the windows of any group sizes and of the rows past the last group."""
    return -(-(experts + 2 + rows // tile) // WIDE) * WIDE


def windows(
    group_sizes_E: Int[Array, " E"], rows: int, tile: int, compact: bool
) -> tuple[Int[Array, "W 4"], Int[Array, "N 2"]]:
    """Returns (windows_W4, place_N2): the windows, and the place of each row in them.

    windows_W4: window's expert, first row that is read, rows to skip there, rows that are the expert's own.
    place_N2: row's window, and its place in that window.

    Rows past the last group come as windows of "expert" E, and unused slots as expert IDLE.

    rows: number of rows of x, a multiple of ALIGN and at least ``tile``; reads never leave x.
    tile: number of rows of a window.
    compact: whether used slots come first, which costs another scan. Without it an expert's slots start at
        ``e + start // tile``, where they never collide either.
    """
    experts = group_sizes_E.shape[0]
    sizes_G = jnp.append(group_sizes_E, rows - jnp.sum(group_sizes_E)).astype(jnp.int32)
    ends_G = jnp.cumsum(sizes_G)
    starts_G = ends_G - sizes_G
    reads_G = starts_G // ALIGN * ALIGN
    if compact:
        tiles_G = jnp.where(sizes_G > 0, (ends_G - reads_G + tile - 1) // tile, 0)
        slots_G = jnp.cumsum(tiles_G) - tiles_G
    else:
        slots_G = jnp.arange(experts + 1, dtype=jnp.int32) + starts_G // tile

    w_W = jnp.arange(window_count(rows, experts, tile), dtype=jnp.int32)
    g_W = jnp.sum(slots_G[None, :] <= w_W[:, None], axis=1, dtype=jnp.int32) - 1
    read_W = reads_G[g_W] + (w_W - slots_G[g_W]) * tile
    start_W = jnp.maximum(read_W, starts_G[g_W])
    stop_W = jnp.minimum(read_W + tile, ends_G[g_W])
    row_W = jnp.clip(read_W, 0, rows - tile)
    expert_W = jnp.where(start_W < stop_W, g_W, IDLE)
    windows_W4 = jnp.stack([expert_W, row_W, start_W - row_W, stop_W - start_W], axis=1)

    r_N = jnp.arange(rows, dtype=jnp.int32)
    g_N = jnp.sum(ends_G[None, :] <= r_N[:, None], axis=1, dtype=jnp.int32)
    read_N = (r_N - reads_G[g_N]) // tile
    first_N = jnp.minimum(reads_G[g_N] + read_N * tile, rows - tile)
    return windows_W4, jnp.stack([slots_G[g_N] + read_N, r_N - first_N], axis=1)


# ---- pieces of both kernels


def launch(body, out_type: jax.ShapeDtypeStruct, interpret: bool, **mesh):
    """Calls ``plgpu.kernel`` with ``body`` as both jax 0.10 and 0.11 take it.

    interpret: whether jax 0.11's public interpreter runs it; jax 0.10 takes its own from the caller's
        context.
    """
    interpreter = getattr(plgpu, "InterpretGPUParams", None) if interpret else None
    return plgpu.kernel(
        body,
        out_type=out_type,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpreter() if interpreter else None,
        **mesh,
    )


def wgmma_nt(acc_MN, a_MK, b_NK, transpose_KN=None) -> None:
    """Does ``acc += a b^T`` on references.

    transpose_KN: space for the transpose, which jax 0.10's interpreter needs; None on a GPU.
    """
    if transpose_KN is None:
        plgpu.wgmma(acc_MN, a_MK, b_NK.T)
        return
    transpose_KN[...] = b_NK[...].T
    plgpu.commit_smem()
    plgpu.wgmma(acc_MN, a_MK, transpose_KN)


def store_rows(tile, y, first, count, row, column) -> None:
    """Stores rows [first, first + count) of the shared-memory ``tile`` to y[row:, column:].

    TMA copies have static sizes, so there is one copy for each power of two in ``count``.
    """
    rows, columns = tile.shape
    size = 1 << (rows.bit_length() - 1)
    offset = jnp.int32(0)
    while size:
        has = count & size

        @pl.when(has != 0)
        def _(size=size, offset=offset):
            plgpu.copy_smem_to_gmem(
                tile.at[pl.ds(first + offset, size)], y.at[pl.ds(row + offset, size), pl.ds(column, columns)]
            )

        offset = offset + has
        size //= 2
