"""``Tables``: where a token's experts will be, by its id or by its last two layers, under one placement.

They are made offline (``jmoe.placement.tabulate``), saved in the placement's file, and read by the token
shuffle before the gate has run. There are two predictors (Speculative MoE): the token id, and an n-gram over
layers. Both give a rank and the share of the token's activations that is expected there, so that they can be
compared.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from jaxtyping import Float, Int

PREFIX = "tables_"
SHARES = ("confidence_LV", "shares_LVR", "next_confidence_LH", "next_shares_LHR")
OPTIONAL = ("shares_LVR", "next_shares_LHR")


@dataclass(frozen=True, eq=False)
class Tables:
    """Tables for L MoE layers, V token ids, R ranks; H = R * R histories ``rank at l-2 * R + rank at l-1``.

    ranks_LV: for each token id, the rank with the most of its activations.
    confidence_LV: share of its activations expected there, float16.
    shares_LVR: that share for every rank; None if the table would be large.
    next_ranks_LH: the same rank by the history; 0 if the history did not occur, as at the first two layers.
    next_confidence_LH: the same share by the history; 0 as above.
    next_shares_LHR: the same shares by the history, 0 as above; None if the table would be large.
    """

    ranks_LV: Int[np.ndarray, "L V"]
    confidence_LV: Float[np.ndarray, "L V"]
    shares_LVR: Float[np.ndarray, "L V R"] | None
    next_ranks_LH: Int[np.ndarray, "L H"]
    next_confidence_LH: Float[np.ndarray, "L H"]
    next_shares_LHR: Float[np.ndarray, "L H R"] | None

    @property
    def count(self) -> int:
        """The number of ranks that the tables are for."""
        return math.isqrt(self.next_ranks_LH.shape[-1])

    def check(self, *, layers: int, ranks: int) -> None:
        """Raises ValueError unless the tables are for so many layers and ranks, and hold ranks and shares."""
        sizes = {"L": layers, "V": self.ranks_LV.shape[-1], "R": ranks, "H": ranks * ranks}
        for field in fields(self):
            array = getattr(self, field.name)
            expected = tuple(sizes[letter] for letter in field.name.rpartition("_")[2])
            if array is not None and array.shape != expected:
                raise ValueError(f"table {field.name} must be {list(expected)}, it is {list(array.shape)}")
        for name in SHARES:
            table = getattr(self, name)
            if table is not None and not (table.dtype.kind == "f" and np.all((table >= 0) & (table <= 1))):
                raise ValueError(f"table {name} must hold shares, numbers from 0 to 1")
        for table in (self.ranks_LV, self.next_ranks_LH):
            if table.dtype.kind not in "iu":
                raise ValueError(f"tables name ranks by integers, found {table.dtype}")
            if table.size and not 0 <= table.min() <= table.max() < ranks:
                raise ValueError(
                    f"tables name ranks from 0 to {ranks - 1}, found {table.min()} to {table.max()}"
                )

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays to save in a file; a table that is None is left out."""
        found = {PREFIX + f.name: getattr(self, f.name) for f in fields(self)}
        return {name: array for name, array in found.items() if array is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self | None:
        """Returns the tables from the arrays of a file, or None if it has no tables."""
        found = {f.name: arrays[PREFIX + f.name] for f in fields(cls) if PREFIX + f.name in arrays}
        if not found:
            return None
        if missing := {f.name for f in fields(cls)} - set(found) - set(OPTIONAL):
            raise KeyError(PREFIX + min(missing))
        return cls(**{**dict.fromkeys(OPTIONAL), **found})
