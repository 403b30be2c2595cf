"""Which sequences hold which KV pages, and what free pages still hold. Pure host code.

A page's content has a name: the hash of all tokens up to its end (``page_names``). A named page can serve
every sequence that begins with those tokens. A page without users is free, and keeps its content until
another sequence needs the page; the least recently used page is evicted first.
"""

from collections import OrderedDict
from collections.abc import Iterable


class RankPages:
    """The pages of one rank.

    blank: free pages without a name.
    kept: free pages with a name, the least recently used first.
    users: number of users of each page.
    names: names of each page's content.
    named: page of each name.
    unwritten: pages that were named since this set was last cleared, for content that the step being planned
        will write.
    """

    def __init__(self, count: int):
        self.count = count
        self.blank = list(range(count - 1, -1, -1))
        self.kept: OrderedDict[int, None] = OrderedDict()
        self.users = [0] * count
        self.names: list[list[bytes]] = [[] for _ in range(count)]
        self.named: dict[bytes, int] = {}
        self.unwritten: set[int] = set()

    @property
    def free(self) -> int:
        return len(self.blank) + len(self.kept)

    def take(self, count: int) -> list[int]:
        """Allocates ``count`` pages for one user and forgets their content; ValueError if fewer are free."""
        if count > self.free:
            raise ValueError(f"{self.free} pages are free, {count} are asked for")
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self.blank:
            page = self.blank.pop()
        else:
            page, _ = self.kept.popitem(last=False)
            self._unname(page)
        self.users[page] = 1
        return page

    def _unname(self, page: int) -> None:
        for name in self.names[page]:
            del self.named[name]
        self.names[page] = []

    def forget(self, pages: Iterable[int]) -> None:
        """Removes the names of these pages: only their present users go on using their content."""
        for page in pages:
            self._unname(page)
            if page in self.kept:
                del self.kept[page]
                self.blank.append(page)

    def give_back(self, pages: Iterable[int]) -> None:
        """Removes one user of each page and frees pages without users. A sequence's later pages become free
        first: its earlier pages are still useful without them."""
        for page in reversed(list(pages)):
            self.users[page] -= 1
            if self.users[page] == 0 and self.names[page]:
                self.kept[page] = None
            elif self.users[page] == 0:
                self.blank.append(page)

    def share(self, pages: Iterable[int]) -> None:
        """Adds one user to each of these named pages."""
        for page in pages:
            self.users[page] += 1
            self.kept.pop(page, None)

    def name(self, page: int, name: bytes) -> None:
        """Names the content of a page. If another page already has the name, that page keeps it."""
        if name not in self.named:
            self.named[name] = page
            self.names[page].append(name)
            self.unwritten.add(page)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The pages with these names, up to the first name that no page has."""
        found = []
        for name in names:
            page = self.named.get(name)
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
        return 1 - sum(rank.free for rank in self.ranks) / (self.pages_per_rank * len(self.ranks))
