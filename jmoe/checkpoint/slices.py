"""A slice of a parameter, read from the tensors and in the form in which a checkpoint keeps it.

Of a stacked tensor only the needed entry is read. Plain numbers are read in chunks: in addition to the slice
there is memory for one chunk, and a transposed chunk is transposed while it is in the cache. Of quantised
numbers the codes of one entry are in memory in addition; of plain ones that are quantised, the numbers of one
tensor, and what quantising a chunk of them needs.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import jax
import numpy as np
from jmoe_kernels.quantised import Coding, Quantised, dequantised

from jmoe.checkpoint.checkpoint import CHUNK, Checkpoint, all_finite
from jmoe.checkpoint.layouts import entries, in_stored_order, stored_shape
from jmoe.checkpoint.params import ParamSpec
from jmoe.checkpoint.quantised.formats import StoredParam
from jmoe.checkpoint.quantised.quantise import quantise
from jmoe.config.reading import named
from jmoe.config.units import brief
from jmoe.models.weights import PLAIN

Buffer = np.ndarray | Quantised  # a slice of a parameter; a quantised one has arrays of numpy


def read_slice(
    checkpoint: Checkpoint, tensor: StoredParam, out: Buffer, written: Coding | None = None
) -> None:
    """Fills ``out``, a C-order slice in float32 or bfloat16, or a quantised one.

    A tensor that is quantised as ``out`` is keeps its codes; a plain tensor is quantised.

    written: coding of which the groups of ``out`` are parts, in which plain numbers are quantised, so that
        they are the same on every mesh; None is the coding of ``out``.
    It raises ValueError naming the tensor for NaN or Inf, or a dtype that is not one of its form's.
    """
    if tensor.format is not None:
        _read_codes(checkpoint, tensor, out)
    elif isinstance(out, Quantised):
        numbers = np.empty(out.shape, np.float32)
        _read_numbers(checkpoint, tensor, numbers)
        with named(f"{checkpoint.tensors[tensor.name].file}: tensor {brief(tensor.name)}"):
            for rows in _steps(numbers):
                _copy(regrouped(quantise(numbers[rows], written or out.coding), out.coding), out[rows])
    else:
        _read_numbers(checkpoint, tensor, out)


def _read_numbers(checkpoint: Checkpoint, tensor: StoredParam, out: np.ndarray) -> None:
    if tensor.form == PLAIN:
        return checkpoint.read_into(tensor.name, out, tensor.expert)
    ordered = in_stored_order(out, tensor.form)
    first = (tensor.expert or 0) * ordered.size
    for start, rows in _chunks(ordered):
        straight = rows.flags.c_contiguous
        values = rows if straight else np.empty(rows.shape, rows.dtype)
        checkpoint.read_run(tensor.name, first + start, values.reshape(-1))
        if not straight:
            rows[...] = values


def _read_codes(checkpoint: Checkpoint, tensor: StoredParam, out: Buffer) -> None:
    """Reads a quantised tensor as it is or, into plain numbers, dequantised."""
    assert tensor.format is not None
    codes = tensor.format.read(checkpoint, tensor.name, tensor.expert, stored_shape(tensor.form, out.shape))
    if isinstance(out, Quantised):
        ordered = jax.tree.map(lambda array: in_stored_order(array, tensor.form), out)
        return _copy(regrouped(codes, out.coding), ordered)
    ordered = in_stored_order(out, tensor.form)
    flat = codes.reshape(-1)
    for start, rows in _chunks(ordered):
        first = start // ordered.shape[-1]
        with np.errstate(over="ignore"):
            numbers = dequantised(flat[first : first + math.prod(rows.shape[:-1])]).astype(out.dtype)
        if not all_finite(numbers.reshape(-1)):
            name = tensor.names[0]
            file = checkpoint.tensors[name].file
            raise ValueError(f"{file}: tensor {brief(name)} has NaN or Inf (as {out.dtype})")
        rows[...] = numbers.reshape(rows.shape)


def _copy(codes: Quantised, out: Quantised) -> None:
    for to, array in zip(jax.tree.leaves(out), jax.tree.leaves(codes), strict=True):
        to[...] = array.reshape(to.shape)


def regrouped(weight: Quantised, coding: Coding) -> Quantised:
    """Returns the same numbers with smaller groups (see ``Coding.split``)."""
    if weight.coding == coding:
        return weight
    old, new = weight.coding.group, coding.group
    assert old and new and replace(weight.coding, group=new) == coding, f"{weight.coding} is not {coding}"

    def repeat(per_group: np.ndarray) -> np.ndarray:
        return np.repeat(per_group, old // new, axis=-1)[..., : coding.num_groups(weight.shape[-1])]

    lows = None if weight.lows is None else repeat(weight.lows)
    return replace(weight, scales=repeat(weight.scales), lows=lows, coding=coding)


def _chunks(ordered: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields parts of ``ordered`` along its first axis, of about CHUNK bytes, each with its start in
    elements."""
    row = math.prod(ordered.shape[1:])
    for part in _steps(ordered):
        yield part.start * row, ordered[part]


def _steps(ordered: np.ndarray) -> Iterator[slice]:
    """Yields slices of the first axis of ``ordered``, each of about CHUNK bytes."""
    step = max(1, CHUNK // max(1, math.prod(ordered.shape[1:]) * ordered.itemsize))
    for at in range(0, len(ordered), step):
        yield slice(at, at + step)


def check_shapes(
    checkpoint: Checkpoint, table: Mapping[str, list[StoredParam]], specs: Mapping[str, ParamSpec]
) -> None:
    """Raises ValueError for a tensor whose shape or dtype does not match the slice that it fills."""
    tensors = checkpoint.tensors
    stacks = _stacked(stored for path in specs for stored in table[path])
    for path, spec in specs.items():
        for stored in table[path]:
            try:
                needed = entries(stored, stored.part_shape(spec.shape))
            except ValueError as error:
                raise ValueError(f"{tensors[stored.names[0]].file}: {error}") from None
            for entry in needed:
                info = tensors[entry.name]
                expected = (*stacks.get(stored.name, ()), *entry.shape)
                if (info.shape or (1,)) != (expected or (1,)):  # a single number may have no axis
                    raise ValueError(
                        f"{info.file}: tensor {brief(entry.name)} must be {list(expected)} by "
                        f"{checkpoint.sizes_source}, it is {list(info.shape)}"
                    )
                if info.dtype not in entry.dtypes:
                    known = ", ".join(entry.dtypes)
                    raise ValueError(
                        f"{info.file}: tensor {brief(entry.name)} has dtype {info.dtype}; supported: {known}"
                    )


def _stacked(all_stored: Iterable[StoredParam]) -> dict[str, tuple[int]]:
    """Returns how many entries each stacked tensor has, as a shape's first axis."""
    count: dict[str, int] = {}
    for stored in all_stored:
        if stored.expert is not None:
            count[stored.name] = max(count.get(stored.name, 0), stored.expert + 1)
    return {name: (entries,) for name, entries in count.items()}
