"""The forms of ``jmoe.models.weights`` in numpy: which tensors a slice is read from, and in which order."""

import numpy as np

from jmoe.checkpoint.quantised.formats import StoredEntry, StoredParam
from jmoe.checkpoint.safetensors_file import DTYPES
from jmoe.models.weights import Form


def entries(tensor: StoredParam, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
    """Returns the entries that a slice of that shape is read from.

    It raises ValueError naming the tensor if its form cannot hold such a slice.
    """
    stored = stored_shape(tensor.form, shape)
    if tensor.format is None:
        return (StoredEntry(tensor.name, stored, tuple(DTYPES)),)
    if tensor.form.is_transposed and tensor.form.row_layout != "plain":
        raise ValueError(f"tensor {tensor.name!r}: {tensor.format.name} is not read transposed")
    return tensor.format.entries(tensor.name, stored)


def stored_shape(form: Form, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape in which the values of a slice of ``shape`` are stored, before any quantisation."""
    if form.row_layout != "plain":
        shape = (shape[0] * shape[1], *shape[2:])
    return (*shape[:-2], shape[-1], shape[-2]) if form.is_transposed else shape


def in_stored_order(out: np.ndarray, form: Form) -> np.ndarray:
    """Returns a view of a slice whose elements in C order are the values in the order in which they are
    stored.

    Its axes may be finer than the stored ones. Values assigned to it, part by part along its first axis, go
    into the slice.
    """
    if form.halved_heads:
        return out.reshape(form.halved_heads, 2, -1, *out.shape[1:]).swapaxes(1, 2)
    if form.row_layout == "alternate":
        out = out.swapaxes(0, 1)
    if not form.is_transposed:
        return out
    return np.moveaxis(out, -1, 0) if form.row_layout != "plain" else out.swapaxes(-1, -2)
