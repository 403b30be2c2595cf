"""The tokens of a step: sequences, and beside prompts perhaps the ones that are being decoded."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from jmoe.moe.types import Phase


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequences:
    """B rows of T tokens each: of as many sequences, or, where a cache holds their keys, several rows of one.
    positions_BT: -1 marks padding. table_BM: page tables, None without a cache. exact_B: sequences that opted
    out of lossy techniques; None = none did. seats_B: a number that each running request keeps (see
    ``Request.seat``). fresh_B: rows that begin with the first token of theirs to be computed; None = those
    that begin at position 0.

    beside: sequences of one token each that go through the layers in the same step, as many a rank, where
    every rank has ``rows`` of these. All tokens together are a grid ``[R, n]``: of each rank the ones beside,
    then its prompts'. Without them the grid is ``[B, T]``. Flat, either has N tokens.

    phase: "decode" if every token continues an answer. A step that holds prompt tokens is one of prefill, as
    they touch nearly every expert anyway.
    """

    tokens_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    table_BM: Int[Array, "B M"] | None = None
    exact_B: Bool[Array, " B"] | None = None
    seats_B: Int[Array, " B"] | None = None
    fresh_B: Bool[Array, " B"] | None = None
    beside: "Sequences | None" = None
    rows: int = field(default=1, metadata={"static": True})
    phase: Phase = field(default="prefill", metadata={"static": True})

    @property
    def pieces(self) -> "tuple[Sequences, ...]":
        return (self,) if self.beside is None else (self.beside, self)

    @property
    def tokens_RN(self) -> Int[Array, "R n"]:
        return self.grid([own.tokens_BT for own in self.pieces])

    @property
    def positions_RN(self) -> Int[Array, "R n"]:
        return self.grid([own.positions_BT for own in self.pieces])

    def grid(self, parts: list[Array]) -> Array:
        """The grid of ``[B, T, ...]`` of every piece."""
        if len(parts) == 1:
            return parts[0]
        ranks, rest = self.tokens_BT.shape[0] // self.rows, parts[0].shape[2:]
        return jnp.concatenate([part.reshape(ranks, -1, *rest) for part in parts], axis=1)

    def cut(self, grid_RN: Array) -> list[Array]:
        """``[B, T, ...]`` of every piece from their grid."""
        if self.beside is None:
            return [grid_RN]
        t, rest = self.tokens_BT.shape[1], grid_RN.shape[2:]
        b = grid_RN.shape[1] - self.rows * t
        return [grid_RN[:, :b].reshape(-1, 1, *rest), grid_RN[:, b:].reshape(-1, t, *rest)]
