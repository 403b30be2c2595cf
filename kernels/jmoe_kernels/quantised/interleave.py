"""The layout "n16" of quantised weights: sixteen rows side by side, for the C++ kernels.

The bytes of sixteen neighbouring rows are permuted among themselves, so a weight keeps its shape, and every
index or partition of whole blocks of rows stays legal. A step holds one word of four bytes of each of the
sixteen rows, and the steps of a block follow each other; ``cpu/src/quantised/form.h`` says how they are read.
A word has four numbers of a byte, or eight nibbles: those of numbers 0 to 3 in the low bits of its bytes,
those of numbers 4 to 7 in the high bits. Scales and lows of a block are ``[group, 16]``.
"""

from typing import Any, Literal

import numpy as np

from jmoe_kernels.quantised.codes import Code, num_packed, numbers_of, scales_as_float

BLOCK = 16  # rows
CHUNK = 1 << 20  # bytes that are permuted at a time
Part = Literal["bytes", "nibbles", "scales"]


def fits(code: Code, shape: tuple[int, ...]) -> bool:
    """Returns whether a weight of that shape is made of whole blocks and steps."""
    return len(shape) > 1 and shape[-2] % BLOCK == 0 and shape[-1] % (4 * num_packed(code)) == 0


def pack(array: np.ndarray, role: str, code: Code, is_scratch: bool) -> np.ndarray:
    """Returns an array of a weight in this layout: ``array`` itself, changed, if it is scratch."""
    part = part_of(role, code)
    if not is_scratch:
        return interleaved(array, part)
    interleave(array, part)
    return array


def numbers(values: Any, code: Code) -> Any:
    """Returns the numbers ``[..., out, in]`` in float32, before any scale."""
    return numbers_of(rows_of(values, part_of("values", code)), code)


def per_group(scales: Any) -> Any:
    """Returns scales or lows as ``[..., out, groups]``, in float32."""
    return scales_as_float(rows_of(scales, "scales"))


def part_of(role: str, code: Code) -> Part:
    """Returns what an array of a weight is to ``interleave``."""
    if role != "values":
        return "scales"
    return "bytes" if num_packed(code) == 1 else "nibbles"


def interleave(array: np.ndarray, part: Part) -> None:
    """Changes rows ``[..., out, n]`` in place, from the order of a checkpoint to that of the layout."""
    if array.size == 0:
        return
    blocks = array.reshape(-1, BLOCK, array.shape[-1])
    assert blocks.base is not None, "the array must be contiguous"
    count = max(1, CHUNK // blocks[0].nbytes)
    for i in range(0, len(blocks), count):
        chunk = blocks[i : i + count]
        if part == "scales":
            chunk[...] = chunk.swapaxes(1, 2).reshape(chunk.shape).copy()
            continue
        words = chunk.view(np.uint32)
        steps = words.swapaxes(1, 2)
        steps = _step_nibbles(steps) if part == "nibbles" else steps.copy()
        words[...] = steps.reshape(words.shape)


def interleaved(array: np.ndarray, part: Part) -> np.ndarray:
    """Returns a copy of rows in the order of the layout; it begins at a multiple of 64 bytes, so that a
    device can use its memory."""
    room = np.empty(array.nbytes + 64, np.uint8)
    first = -room.ctypes.data % 64
    copy = room[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    interleave(copy, part)
    return copy


def rows_of(array: Any, part: Part) -> Any:
    """Returns an array of numpy or jax in the order of a checkpoint that is in the order of the layout."""
    if part == "scales":
        return array.reshape(-1, array.shape[-1], BLOCK).swapaxes(1, 2).reshape(array.shape)
    rows = array.reshape(-1, array.shape[-1] // 4, BLOCK, 4).swapaxes(1, 2)
    if part == "nibbles":
        xp = array.__array_namespace__()
        nibbles = xp.concatenate([rows & 15, rows >> 4], axis=-1)
        rows = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return rows.reshape(array.shape)


def _step_nibbles(words: np.ndarray) -> np.ndarray:
    """Returns words whose nibbles 0 to 7, lowest first, are in the order of a step."""
    low, high = words & 0xFFFF, words >> 16
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F)):
        low, high = (low | low << shift) & mask, (high | high << shift) & mask
    return low | high << 4
