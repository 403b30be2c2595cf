"""Which rank a request enters, and what it finds there. Pure host code.

The reasons, in an order that the engine's setting gives; what is not named is not asked:

- "prefix": the rank whose pages already hold most of the prompt, unless it is much busier than others;
- "experts" (request scheduling of Speculative MoE, arXiv 2503.04398): the one that holds most of the prompt's
  experts, of those that were not given a request yet in this round; a round ends when every rank was given
  one, so that none is left behind;
- "load": the one that runs the fewest requests and has the most free pages.

Where none has anything to say, ranks take turns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from jmoe.engine.page_names import PageNames
from jmoe.engine.schedule.pages import RankPages

# prompt token ids -> the part of their assignments that is expected on each rank
Share = Callable[[list[int]], Sequence[float]]
Reason = Literal["prefix", "experts", "load"]
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True)
class Entry:
    """How a request could enter a rank. held: pages with the beginning of its tokens, all full ones; part: a
    page with all the rest of them, which others go on writing into. found: tokens in both that need not run;
    the last one always does. running, free: the rank's requests and free pages.
    """

    rank: int
    held: list[int]
    part: int | None
    found: int
    running: int
    free: int


def entry_at(
    rank: int, pages: RankPages, tokens: list[int], names: PageNames | None, size: int, running: int
) -> Entry | None:
    """None where there are not enough pages for ``tokens`` and one for each request that runs there already.

    names: of the tokens' pages, None where nothing is to be found. size: tokens of a page. Full pages that
    the planned step writes may be read in it, by tokens of prompts; copied or decoded from they may not.
    """
    held: list[int] = []
    part = None
    if names is not None:
        held = pages.find(names.full(tokens))
        if len(held) == len(tokens) // size:  # the rest may be there too
            rest = names.rest(tokens)
            part = held.pop() if rest is None else next(iter(pages.find([rest])), None)
            if not pages.unwritten.isdisjoint([*held, part]):
                part = None
    reused = sum(not pages.users[page] for page in held)
    need = -(-len(tokens) // size) - len(held) + reused + running
    if part is not None and need + (not pages.users[part]) <= pages.free:
        return Entry(rank, held, part, len(tokens) - 1, running, pages.free)
    if need <= pages.free:
        return Entry(rank, held, None, len(held) * size, running, pages.free)
    return None


class Dispatch:
    """share: what part of a prompt's expected assignments lies on each of ``ranks``; None where nothing says.
    slots: requests that run together on a rank."""

    def __init__(
        self, ranks: int, slots: int, reasons: Sequence[Reason] = REASONS, share: Share | None = None
    ):
        self.ranks, self.slots, self.reasons, self.share = ranks, slots, tuple(reasons), share
        self.round: set[int] = set()  # ranks that were given a request for its experts
        self._turn = 0

    def choose(self, tokens: list[int], entries: list[Entry], least: int) -> Entry:
        """One of the entries for a prompt; least: requests on the rank that runs the fewest."""
        for reason in self.reasons:
            if reason == "prefix":
                calm = least + max(self.slots // 2, 1)
                best = max((e for e in entries if e.running < calm), key=lambda e: e.found, default=None)
                if best is not None and best.found:
                    return best
            elif reason == "experts" and self.share is not None:
                return self._likeliest(self.share(tokens), entries)
            elif reason == "load":
                return max(entries, key=lambda e: (-e.running, e.free, -e.rank))
        self._turn += 1
        return entries[self._turn % len(entries)]

    def _likeliest(self, share: Sequence[float], entries: list[Entry]) -> Entry:
        """The rank for a request with these expected shares, noted in this round."""
        fresh = [e for e in entries if e.rank not in self.round] or entries
        best = max(fresh, key=lambda e: (share[e.rank], e.free, -e.rank))
        self.round.add(best.rank)
        if len(self.round) == self.ranks:
            self.round.clear()
        return best
