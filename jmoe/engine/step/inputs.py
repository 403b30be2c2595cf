"""What a step is told by the host: its shapes, and the arrays of one step.

Rows ``[B, T]``: of decode one token of each sequence; of prefill ``Sizes.run`` tokens of prompts, a long one
over several rows, and beside them one token of each sequence that is being decoded. B comes from short lists
of sizes, so that all shapes compile at warm-up. With several ranks, rows are rank-major: rank r owns rows
``r * B/R .. (r + 1) * B/R``, and those beside prompts likewise.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from jmoe.engine.step.sampling import SamplingRows, blank_rows
from jmoe.moe.types import Phase

FEWEST = 4  # rows beside prompts


@dataclass(frozen=True)
class Sizes:
    """Shapes that compile. decode: sequences a rank; prefill: tokens of prompts a rank, multiples of the
    first, which is a multiple of the page size, with some of ``decode`` beside them (``beside``)."""

    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    page_size: int
    pages_per_rank: int
    table: int  # pages a sequence may have

    @property
    def run(self) -> int:
        """Tokens of one row of a prompt."""
        return self.prefill[0]

    @property
    def beside(self) -> tuple[int, ...]:
        """Sequences a rank beside prompts: all that may run, and smaller sizes, each a quarter at most of the
        next, so that few sequences do not pay for many empty rows; below ``FEWEST`` a row costs next to
        nothing, and a size one more program to compile."""
        picked = [self.decode[-1]]
        for size in reversed(self.decode):
            if FEWEST <= size <= picked[-1] / 4:
                picked.append(size)
        return tuple(reversed(picked))

    def beside_size(self, runs: int) -> int:
        """The smallest compiled size that has a row for each of ``runs``, prompts and sequences beside."""
        return next(s for s in self.beside if s >= runs)

    def decode_size(self, sequences: int) -> int:
        """The smallest compiled batch that holds ``sequences`` a rank."""
        return next(s for s in self.decode if s >= sequences)

    def prefill_size(self, left: int) -> int:
        """The next run for ``left`` prompt tokens: the smallest size that holds them if they fill more than
        half of it, else the largest that they fill; padding never doubles the work."""
        holds = next((s for s in self.prefill if s >= left), self.prefill[-1])
        filled = [s for s in self.prefill if s <= left]
        return holds if not filled or left > holds / 2 else filled[-1]


def window_length(tokens: int, sharing: int, least: int = 1) -> int:
    """What a window of ``tokens`` is padded to: the next power of two, so that few shapes compile, at least
    ``least``, and a whole number for each of the ``sharing`` ranks that split a sequence's tokens."""
    length = max(least, 1 << (tokens - 1).bit_length())
    return -(-length // sharing) * sharing


class HostRows(NamedTuple):
    """Host arrays of rows: tokens and positions ``[B, T]``, page tables ``[B, M]``; which ones opted out of
    lossy techniques, their requests' seats (of a row with none: any number past the last), and which begin
    with the first token of a request to be computed. A token of -1 is the one that was drawn last for the
    row's seat, which the host need not know."""

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    table_BM: np.ndarray
    exact_B: np.ndarray
    seats_B: np.ndarray
    fresh_B: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInput:
    """Host arrays of one step. Those of ``[B]`` have an entry for each token to sample, as many a rank as
    requests may run.

    own: rows of prompts in a step that holds any, else one row of each request that decodes.
    beside: rows of the requests that decode in the same step as prompts, one token each.
    behind_B: position, in the rank's row of the grid (see ``Sequences``), whose logits are used.
    seats_B: the request's seat.
    rows: the request's sampling parameters.
    phase: what the plan says of the step; shapes do not tell it.
    """

    own: HostRows
    beside: HostRows | None
    behind_B: np.ndarray
    seats_B: np.ndarray
    rows: SamplingRows
    phase: Phase = field(metadata={"static": True})


def blank_input(
    vocab_size: int, sizes: Sizes, ranks: int, phase: Phase, sequences: int, tokens: int, beside: int = 0
) -> StepInput:
    """An input in which every token is padding: ``sequences`` rows of ``tokens`` on each of ``ranks``, and
    ``beside`` of one token. It draws as many tokens a rank as it has rows beside, else rows."""
    nobody = ranks * sizes.decode[-1]

    def blank(b: int, t: int) -> HostRows:
        return HostRows(
            np.zeros((b, t), np.int32), np.full((b, t), -1, np.int32), np.zeros((b, sizes.table), np.int32),
            np.zeros(b, bool), np.full(b, nobody, np.int32), np.zeros(b, bool),
        )  # fmt: skip

    drawn = ranks * (beside or sequences)
    return StepInput(
        blank(ranks * sequences, tokens),
        blank(ranks * beside, 1) if beside else None,
        np.zeros(drawn, np.int32),
        np.full(drawn, nobody, np.int32),
        blank_rows(drawn, vocab_size),
        phase,
    )
