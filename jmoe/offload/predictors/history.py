"""The parts of a ``jmoe.placement.profile.Profile`` that the predictors use, as protocols.

A profile is made in a package of its own, which this one does not import.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int


class HistorySample(Protocol):
    """A sample of Q requests.

    experts_QLE: how often each expert was chosen.
    maps_QMLE: gate distributions of M single iterations.
    map_tokens_QM: token ids of these iterations, -1 for none.
    """

    @property
    def experts_QLE(self) -> Int[np.ndarray, "Q L E"]: ...
    @property
    def maps_QMLE(self) -> Float[np.ndarray, "Q M L E"]: ...
    @property
    def map_tokens_QM(self) -> Int[np.ndarray, "Q M"]: ...


class History(Protocol):
    """Routing statistics of past text.

    tokens: number of tokens counted.
    frequency_V: occurrences of each token id.
    nearest_V: seen token id that is most similar to each token id.
    loads_LE: how often each expert was chosen.
    sample: sample of the requests.
    chosen: how often each token id that is passed chose each expert at one layer.
    """

    @property
    def tokens(self) -> int: ...
    @property
    def frequency_V(self) -> Int[np.ndarray, " V"]: ...
    @property
    def nearest_V(self) -> Int[np.ndarray, " V"]: ...
    @property
    def loads_LE(self) -> Int[np.ndarray, "L E"]: ...
    @property
    def sample(self) -> HistorySample: ...
    def chosen(self, layer: int, tokens_T: Int[np.ndarray, " T"]) -> Int[np.ndarray, "T E"]: ...


class _Sample(NamedTuple):
    experts_QLE: Int[np.ndarray, "Q L E"]
    maps_QMLE: Float[np.ndarray, "Q M L E"]
    map_tokens_QM: Int[np.ndarray, "Q M"]


@dataclass(frozen=True, eq=False)
class RenumberedHistory:
    """A history in the numbering of experts that were renumbered: ``experts_LE`` gives each new expert's
    number in the history."""

    history: History
    experts_LE: Int[np.ndarray, "L E"]

    @property
    def tokens(self) -> int:
        return self.history.tokens

    @property
    def frequency_V(self) -> Int[np.ndarray, " V"]:
        return self.history.frequency_V

    @property
    def nearest_V(self) -> Int[np.ndarray, " V"]:
        return self.history.nearest_V

    @property
    def loads_LE(self) -> Int[np.ndarray, "L E"]:
        return np.take_along_axis(self.history.loads_LE, self.experts_LE, 1)

    @property
    def sample(self) -> HistorySample:
        was, each_LE = self.history.sample, self.experts_LE
        return _Sample(
            np.take_along_axis(was.experts_QLE, each_LE[None], 2),
            np.take_along_axis(was.maps_QMLE, each_LE[None, None], 3),
            was.map_tokens_QM,
        )

    def chosen(self, layer: int, tokens_T: Int[np.ndarray, " T"]) -> Int[np.ndarray, "T E"]:
        return self.history.chosen(layer, tokens_T)[:, self.experts_LE[layer]]
