"""The record of the KV pages: their users, and the contents that free pages still have. Pure host code.

A page's content has a name: the hash of all tokens up to its end (``page_names``). A named page can serve
every sequence that begins with those tokens. A page without users is free, and keeps its content until
another sequence needs the page; the least recently used page is evicted first.
"""

from collections import OrderedDict
from collections.abc import Iterable


class RankPages:
    """The pages of one rank.

    blank: free pages without a name.
    cached: free pages with a name, the least recently used first.
    num_users: number of users of each page.
    names: names of each page's content.
    page_of: page of each name.
    unwritten: pages that were named since this set was last cleared, for content that the step being planned
        will write.
    """

    def __init__(self, count: int):
        self.count = count
        self.blank = list(range(count - 1, -1, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.num_users = [0] * count
        self.names: list[list[bytes]] = [[] for _ in range(count)]
        self.page_of: dict[bytes, int] = {}
        self.unwritten: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.cached)

    def allocate(self, count: int) -> list[int]:
        """Allocates ``count`` pages for one user and forgets their content; raises ValueError if fewer are
        free."""
        if count > self.num_free:
            raise ValueError(f"{self.num_free} pages are free, {count} are asked for")
        return [self._allocate_one() for _ in range(count)]

    def _allocate_one(self) -> int:
        if self.blank:
            page = self.blank.pop()
        else:
            page, _ = self.cached.popitem(last=False)
            self._unname(page)
        self.num_users[page] = 1
        return page

    def _unname(self, page: int) -> None:
        for name in self.names[page]:
            del self.page_of[name]
        self.names[page] = []

    def forget(self, pages: Iterable[int]) -> None:
        """Removes the names of these pages: only their present users go on using their content."""
        for page in pages:
            self._unname(page)
            if page in self.cached:
                del self.cached[page]
                self.blank.append(page)

    def free(self, pages: Iterable[int]) -> None:
        """Removes one user of each page and frees pages without users. A sequence's later pages become free
        first: its earlier pages are still useful without them."""
        for page in reversed(list(pages)):
            self.num_users[page] -= 1
            if self.num_users[page] == 0 and self.names[page]:
                self.cached[page] = None
            elif self.num_users[page] == 0:
                self.blank.append(page)

    def share(self, pages: Iterable[int]) -> None:
        """Adds one user to each of these named pages."""
        for page in pages:
            self.num_users[page] += 1
            self.cached.pop(page, None)

    def name(self, page: int, name: bytes) -> None:
        """Names the content of a page. If another page already has the name, that page keeps it."""
        if name not in self.page_of:
            self.page_of[name] = page
            self.names[page].append(name)
            self.unwritten.add(page)

    def find_cached(self, names: Iterable[bytes]) -> list[int]:
        """Returns the pages with these names, up to the first name that no page has."""
        found = []
        for name in names:
            page = self.page_of.get(name)
            if page is None:
                break
            found.append(page)
        return found


class PagePool:
    """``pages_per_rank`` pages on each of ``ranks`` ranks; a sequence's pages all lie on one rank."""

    def __init__(self, ranks: int, pages_per_rank: int, page_size: int):
        self.pages_per_rank, self.page_size = pages_per_rank, page_size
        self.ranks = [RankPages(pages_per_rank) for _ in range(ranks)]

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def usage(self) -> float:
        """Share of all pages in use, 0 to 1."""
        return 1 - sum(rank.num_free for rank in self.ranks) / (self.pages_per_rank * len(self.ranks))
