"""Who holds which KV page. Pure host code: a free list for every rank."""


class PagePool:
    """``pages_per_rank`` pages on each of ``ranks`` ranks; a sequence's pages all lie on one rank."""

    def __init__(self, ranks: int, pages_per_rank: int, page_size: int):
        self.pages_per_rank, self.page_size = pages_per_rank, page_size
        self.free = [list(range(pages_per_rank - 1, -1, -1)) for _ in range(ranks)]

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def roomiest(self) -> int:
        """The rank with the most free pages, the first of equals."""
        return max(range(len(self.free)), key=lambda r: (len(self.free[r]), -r))

    def take(self, rank: int, count: int) -> list[int] | None:
        """``count`` pages of ``rank``, or None (and none taken) where fewer are free."""
        free = self.free[rank]
        if count > len(free):
            return None
        return [free.pop() for _ in range(count)]

    def give_back(self, rank: int, pages: list[int]) -> None:
        self.free[rank].extend(pages)

    @property
    def usage(self) -> float:
        """Share of all pages in use, 0 to 1."""
        total = self.pages_per_rank * len(self.free)
        return 1 - sum(map(len, self.free)) / total
