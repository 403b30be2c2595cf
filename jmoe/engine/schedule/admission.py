"""Chooses the rank of a request, and finds the cached pages that it can use there. Pure host code.

A rank is chosen by these reasons. A setting of the engine gives their order; a reason that it does not name
is not used:

- "prefix": the rank whose pages already hold most of the prompt, unless it is much busier than others;
- "experts" (request scheduling of Speculative MoE, arXiv 2503.04398): the rank that holds most of the
  prompt's experts, among the ranks that did not get a request yet in this round; a round ends when every rank
  got one, so that no rank is passed over;
- "load": the rank that runs the fewest requests, and of these the one with the most free pages.

If no reason decides, ranks take turns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from jmoe.engine.page_names import PageNames
from jmoe.engine.schedule.pages import RankPages

# prompt token ids -> the share of their assignments to experts that is expected on each rank
ExpectedShare = Callable[[list[int]], Sequence[float]]
Reason = Literal["prefix", "experts", "load"]
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True)
class Candidate:
    """A possible admission of a request to a rank.

    rank: number of the rank.
    full_pages: full pages that already hold the beginning of its tokens.
    partial_page: page that holds all its remaining tokens and that other requests may still write into; None
        if no page does.
    num_cached_tokens: number of tokens in both that need not run; the last token always runs.
    num_running: number of requests that run on the rank.
    num_free_pages: number of free pages of the rank.
    """

    rank: int
    full_pages: list[int]
    partial_page: int | None
    num_cached_tokens: int
    num_running: int
    num_free_pages: int


def candidate_at(
    rank: int, pages: RankPages, tokens: list[int], names: PageNames | None, size: int, running: int
) -> Candidate | None:
    """Returns how ``tokens`` could be admitted to ``rank``, or None if the rank has too few free pages.

    The rank needs enough free pages for ``tokens`` and one more for each request that already runs there.
    Full pages that the planned step writes may be read in the same step by tokens of prompts; they may not be
    copied or decoded from.

    names: names of the tokens' pages; None if no cached page may be used.
    size: tokens of a page.
    """
    full_pages: list[int] = []
    partial_page = None
    if names is not None:
        full_pages = pages.find_cached(names.full(tokens))
        if len(full_pages) == len(tokens) // size:  # the rest may be there too
            rest = names.rest(tokens)
            partial_page = full_pages.pop() if rest is None else next(iter(pages.find_cached([rest])), None)
            if not pages.unwritten.isdisjoint([*full_pages, partial_page]):
                partial_page = None
    reused = sum(not pages.num_users[page] for page in full_pages)
    need = -(-len(tokens) // size) - len(full_pages) + reused + running
    if partial_page is not None and need + (not pages.num_users[partial_page]) <= pages.num_free:
        return Candidate(rank, full_pages, partial_page, len(tokens) - 1, running, pages.num_free)
    if need <= pages.num_free:
        return Candidate(rank, full_pages, None, len(full_pages) * size, running, pages.num_free)
    return None


class RankChooser:
    """Chooses the rank for each request.

    ranks: number of ranks.
    seats: maximum of requests that run together on a rank.
    reasons: reasons that choose the rank, in this order.
    share: function that returns the share of a prompt's expected assignments on each rank; None if it is not
        known.
    """

    def __init__(
        self, ranks: int, seats: int, reasons: Sequence[Reason] = REASONS, share: ExpectedShare | None = None
    ):
        self.ranks, self.seats, self.reasons, self.share = ranks, seats, tuple(reasons), share
        self.round: set[int] = set()  # ranks that got a request for its experts in this round
        self._turn = 0

    def choose(self, tokens: list[int], candidates: list[Candidate], least: int) -> Candidate:
        """Chooses one of the candidates for a prompt.

        least: number of requests on the rank that runs the fewest.
        """
        for reason in self.reasons:
            if reason == "prefix":
                calm = least + max(self.seats // 2, 1)
                quiet = (candidate for candidate in candidates if candidate.num_running < calm)
                best = max(quiet, key=lambda candidate: candidate.num_cached_tokens, default=None)
                if best is not None and best.num_cached_tokens:
                    return best
            elif reason == "experts" and self.share is not None:
                return self._likeliest(self.share(tokens), candidates)
            elif reason == "load":
                return max(
                    candidates,
                    key=lambda candidate: (-candidate.num_running, candidate.num_free_pages, -candidate.rank),
                )
        self._turn += 1
        return candidates[self._turn % len(candidates)]

    def _likeliest(self, share: Sequence[float], candidates: list[Candidate]) -> Candidate:
        """Chooses the candidate with the largest expected share and marks its rank in this round."""
        fresh = [candidate for candidate in candidates if candidate.rank not in self.round] or candidates
        best = max(
            fresh, key=lambda candidate: (share[candidate.rank], candidate.num_free_pages, -candidate.rank)
        )
        self.round.add(best.rank)
        if len(self.round) == self.ranks:
            self.round.clear()
        return best
