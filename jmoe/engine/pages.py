"""Who holds which KV page. Pure host code: a free list for every rank."""


class PagePool:
    """``pages_per_rank`` pages on each of ``ranks`` ranks; a sequence's pages all lie on one rank."""

    def __init__(self, ranks: int, pages_per_rank: int, page_size: int):
        self.pages_per_rank, self.page_size = pages_per_rank, page_size
        self.free = [list(range(pages_per_rank - 1, -1, -1)) for _ in range(ranks)]

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self, rank: int, count: int) -> list[int]:
        """``count`` pages of ``rank``; ValueError where fewer are free."""
        free = self.free[rank]
        if count > len(free):
            raise ValueError(f"rank {rank} has {len(free)} free pages, {count} are asked for")
        return [free.pop() for _ in range(count)]

    def give_back(self, rank: int, pages: list[int]) -> None:
        self.free[rank].extend(pages)

    @property
    def usage(self) -> float:
        """Share of all pages in use, 0 to 1."""
        total = self.pages_per_rank * len(self.free)
        return 1 - sum(map(len, self.free)) / total
