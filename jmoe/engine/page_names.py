"""Names of pages: hashes of a sequence's tokens, so that sequences with equal beginnings share pages.

A page's name hashes the name of the previous page and the page's own tokens. The first page hashes the
``kind`` instead: what else the content depends on (the request's cache salt, the lossy techniques that
touched it, and how keys and values are kept), so that pages of one kind never serve another. The hash is
SHA-256, as in vLLM: with a short hash somebody could make two prompts whose pages are mistaken for each
other.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


class PageNames:
    """Names of the full pages of one growing sequence, each computed once."""

    def __init__(self, page_size: int, kind: str):
        self.page_size = page_size
        self.root = hashlib.sha256(kind.encode()).digest()
        self._full: list[bytes] = []

    def full(self, tokens: Sequence[int]) -> list[bytes]:
        """Returns the names of the full pages of ``tokens``, which begin with the tokens of earlier calls."""
        size = self.page_size
        for page in range(len(self._full), len(tokens) // size):
            self._full.append(self._name(page, tokens[page * size : (page + 1) * size]))
        return self._full[: len(tokens) // size]

    def rest(self, tokens: Sequence[int]) -> bytes | None:
        """Returns the name of the last page of ``tokens`` if it is only partly full, or None if they fill
        it."""
        pages = len(self.full(tokens))
        rest = tokens[pages * self.page_size :]
        return self._name(pages, rest) if rest else None

    def _name(self, page: int, tokens: Sequence[int]) -> bytes:
        before = self._full[page - 1] if page else self.root
        return hashlib.sha256(before + np.asarray(tokens, np.int32).tobytes()).digest()
