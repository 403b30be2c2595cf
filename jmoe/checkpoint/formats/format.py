"""What a format's file declares: the tensors that keep a parameter's values, and how these are read."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jmoe.checkpoint.hf_reader import HFCheckpoint


@dataclass(frozen=True)
class Entry:
    """What is read of one tensor. shape: of one entry of a stacked one. dtypes: the file's names for them."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """One way to keep numbers; ``Form`` and ``Stored`` say which slice of a parameter they are.

    name: as ``Form.format`` has it.
    suffixes: what follows a stored name in the names of the tensors that keep its values.
    entries: what is read of each of these, given the stored name and the shape of the values; ValueError
        names the tensor where the format cannot keep such a shape.
    read: a function that fills a flat array, float32 or bfloat16, with the values of a stored name from a
        place on, in C order. They are whole rows, about as many as fit in the cache. ValueError names the
        tensor for NaN or Inf.
    """

    name: str
    suffixes: tuple[str, ...]
    entries: Callable[[str, tuple[int, ...]], tuple[Entry, ...]]
    read: Callable[[HFCheckpoint, str, int, np.ndarray], None]
