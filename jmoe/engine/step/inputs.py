"""The inputs that the host passes to a step: the shapes, and the arrays of one step.

A decode step has rows ``[B, 1]``, one token of each sequence. A prefill step has rows of ``Sizes.row_tokens``
prompt tokens, several rows for a long prompt, and a second array with one token of each sequence that decodes
in the same step. B comes from short lists of sizes, so that all shapes compile at warm-up. With several
ranks, rows are rank-major: rank r owns rows ``r * B/R .. (r + 1) * B/R``, and likewise in the second array.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from jmoe.config.techniques import Phase
from jmoe.engine.step.sampling import SamplingRows, blank_rows
from jmoe.nn.kv_cache import StateSizes

FEWEST = 4  # decode rows in the same step as prompts


@dataclass(frozen=True)
class Sizes:
    """Shapes that compile.

    decode: sequences per rank of a decode step.
    prefill: prompt tokens per rank of a prefill step: multiples of the first, which is a multiple of the page
        size. Such a step also has decode rows, see ``mixed_decode``.
    page_size: tokens of a page.
    pages_per_rank: pages of the KV cache on each rank.
    table_width: pages that a sequence may have.
    """

    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    page_size: int
    pages_per_rank: int
    table_width: int

    @property
    def state(self) -> StateSizes:
        """The sizes of the state that each rank keeps of a layer."""
        return StateSizes(self.pages_per_rank, self.page_size, self.decode[-1])

    @property
    def row_tokens(self) -> int:
        """Tokens of one prompt row."""
        return self.prefill[0]

    @property
    def mixed_decode(self) -> tuple[int, ...]:
        """Decode rows per rank in the same step as prompts: as many as may run, and smaller sizes.

        Each size is at most a quarter of the next, so that few sequences do not pay for many empty rows.
        Below ``FEWEST`` a row costs almost nothing, but each size is one more program to compile.
        """
        picked = [self.decode[-1]]
        for size in reversed(self.decode):
            if FEWEST <= size <= picked[-1] / 4:
                picked.append(size)
        return tuple(reversed(picked))

    def mixed_decode_size(self, runs: int) -> int:
        """Returns the smallest size of ``mixed_decode`` that has a row for each of ``runs``, prompts and
        decodes."""
        return next(s for s in self.mixed_decode if s >= runs)

    def decode_size(self, sequences: int) -> int:
        """Returns the smallest compiled decode batch that holds ``sequences`` per rank."""
        return next(s for s in self.decode if s >= sequences)

    def prefill_size(self, tokens: int) -> int:
        """Returns the prefill size for ``tokens`` prompt tokens: the smallest that holds them if they fill
        more than half of it, else the largest that they fill. So padding never doubles the work."""
        holds = next((s for s in self.prefill if s >= tokens), self.prefill[-1])
        filled = [s for s in self.prefill if s <= tokens]
        return holds if not filled or tokens > holds / 2 else filled[-1]


class HostRows(NamedTuple):
    """Host arrays of a step's rows.

    tokens_BT: token ids; -1 is the token sampled last for the row's seat, which the host need not know.
    positions_BT: position of each token; -1 at padding.
    table_BM: page table of each row.
    exact_B: rows whose request opted out of lossy techniques.
    seats_B: seat of each row's request; a row without a request has any number past the last seat.
    fresh_B: rows that begin with the first token of their request that is computed.
    """

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    table_BM: np.ndarray
    exact_B: np.ndarray
    seats_B: np.ndarray
    fresh_B: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInput:
    """Host arrays of one step. Arrays ``[B]`` have one entry for each token to sample, as many per rank as
    requests may run in the step.

    main_rows: prompt rows if the step has any, else one row of each request that decodes.
    decode_rows: rows of the requests that decode in the same step as prompts, one token each.
    logit_columns_B: column, in the rank's row of the grid (see ``Sequences``), whose logits are used.
    seats_B: seat of the request.
    sampling_rows: sampling parameters of the request.
    phase: phase of the step as planned; it does not follow from the shapes.
    """

    main_rows: HostRows
    decode_rows: HostRows | None
    logit_columns_B: np.ndarray
    seats_B: np.ndarray
    sampling_rows: SamplingRows
    phase: Phase = field(metadata={"static": True})


def blank_input(
    vocab_size: int, sizes: Sizes, ranks: int, phase: Phase, sequences: int, tokens: int, decode_rows: int = 0
) -> StepInput:
    """Returns an input in which every token is padding.

    Each of ``ranks`` has ``sequences`` rows of ``tokens``, and ``decode_rows`` rows of one token. Each
    rank samples ``decode_rows`` tokens, or ``sequences`` if ``decode_rows`` is 0.
    """
    nobody = ranks * sizes.decode[-1]

    def blank(b: int, t: int) -> HostRows:
        return HostRows(
            tokens_BT=np.zeros((b, t), np.int32),
            positions_BT=np.full((b, t), -1, np.int32),
            table_BM=np.zeros((b, sizes.table_width), np.int32),
            exact_B=np.zeros(b, bool),
            seats_B=np.full(b, nobody, np.int32),
            fresh_B=np.zeros(b, bool),
        )

    samples = ranks * (decode_rows or sequences)
    return StepInput(
        blank(ranks * sequences, tokens),
        blank(ranks * decode_rows, 1) if decode_rows else None,
        np.zeros(samples, np.int32),
        np.full(samples, nobody, np.int32),
        blank_rows(samples, vocab_size),
        phase,
    )
