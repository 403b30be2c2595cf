"""The declaration of a format: the tensors that store a parameter's values, and the way to read them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jmoe.checkpoint.hf_reader import HFCheckpoint


@dataclass(frozen=True)
class StoredEntry:
    """One tensor that is read, and the form that it must have.

    name: name of the tensor.
    shape: shape of the tensor, or of one entry if it is stacked.
    dtypes: names of the allowed dtypes in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """One way to store numbers; ``Form`` and ``StoredTensor`` describe which slice of a parameter they are.

    name: name of the format in ``Form.number_format``.
    suffixes: what follows a stored name in the names of the tensors that store its values.
    entries: function of the stored name and the shape of the values; returns what is read from each of these
        tensors. It raises ValueError naming the tensor if the format cannot store such a shape.
    read: function that fills a flat array, float32 or bfloat16, with the values of a stored name from a start
        position on, in C order. They are whole rows, about as many as fit in the cache. It raises ValueError
        naming the tensor for NaN or Inf.
    """

    name: str
    suffixes: tuple[str, ...]
    entries: Callable[[str, tuple[int, ...]], tuple[StoredEntry, ...]]
    read: Callable[[HFCheckpoint, str, int, np.ndarray], None]
