"""Makes a curve of perplexity over active experts for each method, and compares curves at equal ratios.

A point is a setting: the ratio of its active experts to those of plain top-k, and the difference between each
window's loss and its lossless loss. Between two points the losses are interpolated window by window, so that
a comparison of two curves is paired and has the standard error of its own interpolated losses. Every curve
ends at (1, 0), which is plain top-k.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Float
from shared.results import perplexity_change

METHODS = ("affinity", "oea", "budget", "popularity", "random")
CENTINATS = 100  # a window's loss is kept in whole hundredths of a nat


@dataclass(frozen=True)
class Curve:
    """The curve of one method.

    ratio_S: active experts over those of plain top-k, in ascending order; the last is 1.
    delta_SN: nats a token by which each window is worse than lossless.
    """

    ratio_S: Float[np.ndarray, " S"]
    delta_SN: Float[np.ndarray, "S N"]

    @classmethod
    def of(cls, run: dict[str, Any], method: str, tokens: int) -> Self:
        """Makes the curve from one protocol's settings.

        run: figures of every setting by name.
        method: method whose settings are used.
        tokens: number of tokens that are scored in a window.
        """
        rows = [row for name, row in run.items() if name.split("/")[0] == method]
        rows = sorted(rows, key=lambda row: row["active"] / row["plain"])
        delta_SN = np.array([row["delta"] for row in rows]) / CENTINATS / tokens
        ratios = [row["active"] / row["plain"] for row in rows]
        return cls(np.array([*ratios, 1.0]), np.vstack([delta_SN, np.zeros_like(delta_SN[:1])]))

    def at(self, ratio: float) -> np.ndarray | None:
        """Returns each window's loss at ``ratio``, None below the curve's strongest setting."""
        if not self.ratio_S[0] <= ratio <= 1:
            return None
        after = int(np.searchsorted(self.ratio_S, ratio))
        if after == 0:
            return self.delta_SN[0]
        low, high = self.ratio_S[after - 1 : after + 1]
        part = (ratio - low) / (high - low)
        return (1 - part) * self.delta_SN[after - 1] + part * self.delta_SN[after]

    def ratio_at(self, percents: float) -> tuple[float, bool]:
        """Returns the least ratio, from 1 down, before perplexity rises by ``percents``, and whether it did.

        If it did not, the ratio is that of the curve's strongest setting.
        """
        limit = math.log1p(percents / 100)
        mean_S = self.delta_SN.mean(axis=1)
        for i in range(len(mean_S) - 2, -1, -1):
            if mean_S[i] > limit:
                part = (limit - mean_S[i + 1]) / (mean_S[i] - mean_S[i + 1])
                return float(self.ratio_S[i + 1] + part * (self.ratio_S[i] - self.ratio_S[i + 1])), True
        return float(self.ratio_S[0]), False


def curves(quality: dict[str, Any], protocol: str) -> dict[str, Curve]:
    """Returns every method's curve under a protocol (for example "mixed/16" or "single/16/half")."""
    length = quality["length"]
    tokens = length - 1 - (length // 2 if protocol.endswith("/half") else 0)
    return {method: Curve.of(quality["runs"][protocol], method, tokens) for method in METHODS}


def compared(a: Curve, b: Curve, ratio: float, domains: int) -> tuple[float, float] | None:
    """Returns by how many % of perplexity ``b`` is worse than ``a`` at ``ratio``, and the standard error."""
    ours, theirs = a.at(ratio), b.at(ratio)
    return None if ours is None or theirs is None else perplexity_change(theirs - ours, domains)
