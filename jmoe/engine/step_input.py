"""What a step is told by the host: its shapes, and the arrays of one step.

Sequences ``[B, T]``, and beside the prompts of a prefill those that are being decoded. B and T come from
short lists of sizes, so that all shapes compile at warm-up. With several ranks, rows are rank-major: rank r
owns rows ``r * B/R .. (r + 1) * B/R``, and those beside prompts likewise.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jmoe.engine.sampling import SamplingRows, blank_rows


@dataclass(frozen=True)
class Sizes:
    """Shapes that compile. decode: sequences a rank; prefill: tokens a run (multiples of the page size), with
    the largest of ``decode`` beside it."""

    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    page_size: int
    pages_per_rank: int
    table: int  # pages a sequence may have

    def decode_size(self, sequences: int) -> int:
        """The smallest compiled batch that holds ``sequences`` a rank."""
        return next(s for s in self.decode if s >= sequences)

    def prefill_size(self, left: int) -> int:
        """The next run for ``left`` prompt tokens: the smallest size that holds them if they fill more than
        half of it, else the largest that they fill; padding never doubles the work."""
        holds = next((s for s in self.prefill if s >= left), self.prefill[-1])
        filled = [s for s in self.prefill if s <= left]
        return holds if not filled or left > holds / 2 else filled[-1]


class HostRows(NamedTuple):
    """Host arrays of sequences: tokens and positions ``[B, T]``, page tables ``[B, M]``. A token of -1 is the
    one that was drawn last for the row's seat, which the host need not know."""

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    table_BM: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInput:
    """Host arrays of one step. own: its sequences; last_B: the last index of each. beside: those of one token
    each beside prompts. fresh_B: of ``own``, the first of its tokens to be computed.

    Of all rows, those beside first: sampling parameters, which ones opted out of lossy techniques, their
    seats (a row with none: any number past the last).
    """

    own: HostRows
    last_B: np.ndarray
    fresh_B: np.ndarray
    beside: HostRows | None
    rows: SamplingRows
    exact_B: np.ndarray
    seats_B: np.ndarray

    @property
    def decodes(self) -> bool:
        return self.own.tokens_BT.shape[1] == 1 and self.beside is None


def blank_input(
    vocab_size: int, sizes: Sizes, ranks: int, sequences: int, tokens: int, beside: int = 0
) -> StepInput:
    """An input in which every token is padding: ``sequences`` rows of ``tokens`` on each of ``ranks``, and
    ``beside`` of one token."""

    def blank(b: int, t: int) -> HostRows:
        tokens_BT = np.zeros((b, t), np.int32)
        return HostRows(tokens_BT, np.full((b, t), -1, np.int32), np.zeros((b, sizes.table), np.int32))

    own, extra = ranks * sequences, ranks * beside
    return StepInput(
        blank(own, tokens), np.zeros(own, np.int32), np.zeros(own, bool),
        blank(extra, 1) if beside else None,
        blank_rows(own + extra, vocab_size),
        np.zeros(own + extra, bool), np.full(own + extra, ranks * sizes.decode[-1], np.int32),
    )  # fmt: skip
