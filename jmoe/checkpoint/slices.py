"""A slice of a parameter, read from the tensors and in the form in which a checkpoint keeps it.

Of a stacked tensor only the needed entry is read, and in chunks: in addition to the slice there is memory for
one chunk, and a transposed chunk is transposed while it is in the cache.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jmoe.checkpoint.formats import FORMATS
from jmoe.checkpoint.hf_reader import CHUNK, HFCheckpoint
from jmoe.checkpoint.layouts import entries, in_stored_order, tensor_names
from jmoe.checkpoint.params import ParamSpec
from jmoe.checkpoint.safetensors_file import TensorInfo
from jmoe.config.units import brief
from jmoe.models.weights import PLAIN, StoredTensor


def read_slice(checkpoint: HFCheckpoint, tensor: StoredTensor, out: np.ndarray) -> None:
    """Fills ``out``, a C-order slice in float32 or bfloat16.

    It raises ValueError naming the tensor for NaN or Inf, or a dtype that is not one of its form's.
    """
    if tensor.form == PLAIN:
        return checkpoint.read_into(tensor.name, out, tensor.expert)
    ordered, read = in_stored_order(out, tensor.form), FORMATS[tensor.form.number_format].read
    first = (tensor.expert or 0) * ordered.size
    for start, rows in _chunks(ordered):
        straight = rows.flags.c_contiguous
        values = rows if straight else np.empty(rows.shape, rows.dtype)
        read(checkpoint, tensor.name, first + start, values.reshape(-1))
        if not straight:
            rows[...] = values


def _chunks(ordered: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields parts of ``ordered`` along its first axis, of about CHUNK bytes, each with its start in
    elements."""
    row = math.prod(ordered.shape[1:])
    step = max(1, CHUNK // max(1, row * ordered.itemsize))
    for at in range(0, len(ordered), step):
        yield at * row, ordered[at : at + step]


def check_shapes(
    tensors: Mapping[str, TensorInfo], table: Mapping[str, list[StoredTensor]], specs: Mapping[str, ParamSpec]
) -> None:
    """Raises ValueError for a tensor whose shape or dtype does not match the slice that it fills."""
    stacks = _stacked(stored for path in specs for stored in table[path])
    for path, spec in specs.items():
        for stored in table[path]:
            try:
                needed = entries(stored, spec.shape[len(stored.index) :])
            except ValueError as error:
                raise ValueError(f"{tensors[tensor_names(stored)[0]].file}: {error}") from None
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


def _stacked(all_stored: Iterable[StoredTensor]) -> dict[str, tuple[int]]:
    """Returns how many entries each stacked tensor has, as a shape's first axis."""
    count: dict[str, int] = {}
    for stored in all_stored:
        if stored.expert is not None:
            count[stored.name] = max(count.get(stored.name, 0), stored.expert + 1)
    return {name: (entries,) for name, entries in count.items()}
