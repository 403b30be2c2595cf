"""A grammar that begins after the model's thoughts, in which it may write what it wants."""

from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np

from jmoe.engine.grammar.thought_tokens import Place, ThoughtTokens


class Inner(Protocol):
    """The constraint of the answer's own text (``engine.request.Constraint``)."""

    @property
    def is_open(self) -> bool: ...
    def allowed(self) -> np.ndarray: ...
    def is_allowed(self, token_id: int) -> bool: ...
    def accept(self, token_id: int) -> None: ...


class AfterThoughts:
    """The state of an answer whose grammar begins after thoughts (``engine.request.Constraint``).

    The answer may begin with thoughts or without. After them it may have some white space and repeat the
    closing marker once; then it follows the grammar. Inside of thoughts every token is allowed, except for
    one that closes the thoughts and goes on with more than white space, and except for end tokens if the
    grammar does not allow an empty answer.

    make: function that returns the grammar's constraint at its beginning, such as
        ``CompiledGrammar.constraint``. It may raise ValueError.
    tokens: tokens beside the markers of thoughts.
    end_ids: tokens that end an answer.
    in_thought: whether the answer begins inside of thoughts.
    """

    def __init__(
        self,
        make: Callable[[], Inner],
        tokens: ThoughtTokens,
        end_ids: Collection[int],
        *,
        in_thought: bool,
    ):
        self.make, self.tokens = make, tokens
        self.place: Place | None = Place("thoughts" if in_thought else "start")
        self.inner: Inner | None = make()  # None where the text so far cannot be the grammar's
        self._barred_ends = [id for id in end_ids if not self.inner.is_allowed(id)]

    @property
    def is_open(self) -> bool:
        if self.place is not None and self.place.kind == "thoughts":
            return True
        return self.inner is not None and self.inner.is_open

    def allowed(self) -> np.ndarray:
        if self.place is None:
            assert self.inner is not None
            return self.inner.allowed()
        mask = self.tokens.mask(self.place)
        if self.place.kind == "thoughts":
            mask = mask.copy()
            for id in self._barred_ends:
                mask[id // 32] &= ~np.uint32(1 << id % 32)
        elif self.inner is not None:
            mask = mask | self.inner.allowed()
        if not mask.any():
            raise ValueError("no token of the vocabulary continues the marker of thoughts")
        return mask

    def is_allowed(self, token_id: int) -> bool:
        if self.place is not None and self.place.kind == "thoughts":
            return token_id not in self._barred_ends and self.tokens.passes(self.place, token_id)
        if self.place is not None and self.tokens.passes(self.place, token_id):
            return True
        return self.inner is not None and self.inner.is_allowed(token_id)

    def accept(self, token_id: int) -> None:
        if self.place is None:
            assert self.inner is not None
            self.inner.accept(token_id)
            return
        if not self.is_allowed(token_id):
            raise ValueError("the grammar failed: a token does not follow it")
        before, after = self.place, self.tokens.follow(self.place, token_id)
        if after is not None and after.kind == "gap" and after.is_border:
            self.inner = self.make()
        elif after is not None and "thoughts" in (before.kind, after.kind):
            self.inner = None
        elif self.inner is not None and self.inner.is_allowed(token_id):
            self.inner.accept(token_id)
        else:
            self.inner = None
        self.place = after
