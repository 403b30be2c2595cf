"""The forms of ``jmoe.models.weights`` in numpy: which tensors a slice is read from, and in which order."""

import numpy as np

from jmoe.checkpoint.formats import FORMATS, Entry
from jmoe.models.weights import Form, Stored


def tensor_names(stored: Stored) -> tuple[str, ...]:
    """The names of the tensors in the checkpoint."""
    return tuple(stored.name + suffix for suffix in FORMATS[stored.form.format].suffixes)


def entries(stored: Stored, shape: tuple[int, ...]) -> tuple[Entry, ...]:
    """The entries that a slice of that shape is read from.

    Raises ValueError naming the tensor if its form cannot hold such a slice.
    """
    return FORMATS[stored.form.format].entries(stored.name, stored_shape(stored.form, shape))


def stored_shape(form: Form, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which the values of a slice of ``shape`` are stored, before any quantisation."""
    if form.rows != "plain":
        shape = (shape[0] * shape[1], *shape[2:])
    return (*shape[:-2], shape[-1], shape[-2]) if form.transposed else shape


def in_stored_order(out: np.ndarray, form: Form) -> np.ndarray:
    """A view of a slice whose elements in C order are the values in the order in which they are stored.

    Its axes may be finer than the stored ones. Values assigned to it, part by part along its first axis, go
    into the slice.
    """
    if form.rows == "alternate":
        out = out.swapaxes(0, 1)
    if not form.transposed:
        return out
    return np.moveaxis(out, -1, 0) if form.rows != "plain" else out.swapaxes(-1, -2)
