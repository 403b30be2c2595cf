"""A slice of a parameter, read from the tensors and in the form in which a checkpoint keeps it.

Never more of a stacked tensor than the entry that is meant, and by chunks: beside the slice there is memory
for one chunk, and a transposed one is turned round while it is in the cache.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jmoe.checkpoint.forms import NO_NUMBER, PAIRS, dequantised, entries, in_stored_order, stored_shape
from jmoe.checkpoint.hf_reader import CHUNK, HFCheckpoint, all_finite
from jmoe.checkpoint.params import ParamSpec
from jmoe.checkpoint.safetensors_file import TensorInfo
from jmoe.config.units import brief
from jmoe.models.weights import PLAIN, Stored


def read_slice(checkpoint: HFCheckpoint, stored: Stored, out: np.ndarray) -> None:
    """Fills ``out``, a C-order slice in float32 or bfloat16.

    Raises ValueError naming the tensor for NaN or Inf, or a dtype that is not one of its form's.
    """
    if stored.form == PLAIN:
        return checkpoint.read_into(stored.name, out, stored.part)
    ordered = in_stored_order(out, stored.form)
    if stored.form.mxfp4:
        _read_mxfp4(checkpoint, stored, ordered)
    elif ordered.flags.c_contiguous:
        checkpoint.read_into(stored.name, out.reshape(stored_shape(stored.form, out.shape)), stored.part)
    else:
        _read_ordered(checkpoint, stored, ordered)


def _read_ordered(checkpoint: HFCheckpoint, stored: Stored, ordered: np.ndarray) -> None:
    first = (stored.part or 0) * ordered.size
    for start, rows in _chunks(ordered):
        values = np.empty(rows.shape, ordered.dtype)
        checkpoint.read_run(stored.name, first + start, values.reshape(-1))
        rows[...] = values


def _read_mxfp4(checkpoint: HFCheckpoint, stored: Stored, ordered: np.ndarray) -> None:
    (blocks, scales), part = stored.tensors, stored.part or 0
    for start, rows in _chunks(ordered):
        at, count = (part * ordered.size + start) // (2 * PAIRS), rows.size // (2 * PAIRS)
        exponents = checkpoint.read_bytes(scales, at, count)
        if (exponents == NO_NUMBER).any():
            file = checkpoint.tensors[scales].file
            raise ValueError(f"{file}: tensor {brief(scales)} has the scale {NO_NUMBER}, which is NaN")
        pairs = checkpoint.read_bytes(blocks, at * PAIRS, count * PAIRS)
        values = dequantised(pairs.reshape(-1, PAIRS), exponents, ordered.dtype)
        if not all_finite(values):
            file = checkpoint.tensors[blocks].file
            raise ValueError(f"{file}: tensor {brief(blocks)} has NaN or Inf (as {ordered.dtype})")
        rows[...] = values.reshape(rows.shape)


def _chunks(ordered: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Parts of ``ordered`` along its first axis, of about CHUNK bytes, and where each starts, in elements."""
    row = math.prod(ordered.shape[1:])
    step = max(1, CHUNK // max(1, row * ordered.itemsize))
    for at in range(0, len(ordered), step):
        yield at * row, ordered[at : at + step]


def check_shapes(
    tensors: Mapping[str, TensorInfo], table: Mapping[str, list[Stored]], specs: Mapping[str, ParamSpec]
) -> None:
    """Raises ValueError for a tensor that does not have the shape and a dtype of what it fills."""
    stacks = _stacked(stored for path in specs for stored in table[path])
    for path, spec in specs.items():
        for stored in table[path]:
            try:
                needed = entries(stored, spec.shape[len(stored.index) :])
            except ValueError as error:
                raise ValueError(f"{tensors[stored.tensors[0]].file}: {error}") from None
            for entry in needed:
                info = tensors[entry.name]
                expected = (*stacks.get(stored.name, ()), *entry.shape)
                if info.shape != expected:
                    raise ValueError(
                        f"{info.file}: tensor {brief(entry.name)} must be {list(expected)} by config.json, "
                        f"it is {list(info.shape)}"
                    )
                if info.dtype not in entry.dtypes:
                    known = ", ".join(entry.dtypes)
                    raise ValueError(
                        f"{info.file}: tensor {brief(entry.name)} has dtype {info.dtype}; supported: {known}"
                    )


def _stacked(all_stored: Iterable[Stored]) -> dict[str, tuple[int]]:
    """How many entries each stacked tensor has, as a shape's first axis."""
    count: dict[str, int] = {}
    for stored in all_stored:
        if stored.part is not None:
            count[stored.name] = max(count.get(stored.name, 0), stored.part + 1)
    return {name: (entries,) for name, entries in count.items()}
