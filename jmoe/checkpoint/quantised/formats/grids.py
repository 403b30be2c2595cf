"""Scales that a block, a group, a row or the whole of a weight shares: their shape, and one for each row."""

import numpy as np
from jmoe_kernels.quantised import Scales

Block = tuple[int | None, int | None]  # rows and columns that share a scale; None is all of them
LARGEST = 1 << 16  # rows or columns of a block; published ones have some hundreds
FLOAT_SCALES: dict[str, Scales] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def grid_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Returns the shape of the scales of numbers ``[..., out, in]``; the last blocks may be cut."""
    if block == (None, None):
        return (1,)
    *front, out, inner = shape
    return (*front, _blocks(out, block[0]), _blocks(inner, block[1]))


def by_row(grid: np.ndarray, shape: tuple[int, ...], block: Block) -> np.ndarray:
    """Returns the scales ``[..., out, groups]`` of numbers of that shape, in C order."""
    *front, out, _ = shape
    whole = grid.reshape(1, 1) if block == (None, None) else grid
    if block[0] != 1:
        whole = np.repeat(whole, min(block[0] or out, out), axis=-2)[..., :out, :]
    return np.ascontiguousarray(np.broadcast_to(whole, (*front, *whole.shape[-2:])))


def check_groups(name: str, shape: tuple[int, ...], block: Block) -> None:
    """Raises ValueError naming the tensor if groups of one row do not divide the rows."""
    if block[0] == 1 and block[1] is not None and shape[-1] % block[1]:
        raise ValueError(f"tensor {name!r}: rows of {shape[-1]} do not split into groups of {block[1]}")


def _blocks(size: int, block: int | None) -> int:
    return 1 if block is None else -(-size // block)
