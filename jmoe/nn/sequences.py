"""The tokens of a step: prompts, sequences that decode, or both in the same step."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from jmoe.config.techniques import Phase


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequences:
    """B rows of T tokens each: one row per sequence or, if a cache holds the keys, one or more.

    tokens_BT: token ids.
    positions_BT: position of each token; -1 marks padding.
    table_BM: page table of each row; None without a cache.
    exact_B: rows that opted out of lossy techniques; None if none did.
    seats_B: seat of each row's request, a number that it keeps while it runs (see ``RequestState.seat``).
    fresh_B: rows that begin with the first token of their sequence that is computed; None means the rows that
        begin at position 0.
    decoding: rows of one token each, of sequences that decode in the same step; every rank has equally many.
    num_rows: number of rows per rank, without ``decoding``; used only if there is ``decoding``.
    phase: "decode" if every token continues an answer. A step with prompt tokens is a prefill step, as they
        touch nearly every expert anyway.

    All tokens together form a grid ``[R, n]``: row r has rank r's ``decoding`` tokens, then its other tokens.
    Without ``decoding`` the grid is ``[B, T]``. Flattened, either has N tokens.
    """

    tokens_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    table_BM: Int[Array, "B M"] | None = None
    exact_B: Bool[Array, " B"] | None = None
    seats_B: Int[Array, " B"] | None = None
    fresh_B: Bool[Array, " B"] | None = None
    decoding: "Sequences | None" = None
    num_rows: int = field(default=1, metadata={"static": True})
    phase: Phase = field(default="prefill", metadata={"static": True})

    @property
    def pieces(self) -> "tuple[Sequences, ...]":
        return (self,) if self.decoding is None else (self.decoding, self)

    @property
    def tokens_RN(self) -> Int[Array, "R n"]:
        return self.grid([own.tokens_BT for own in self.pieces])

    @property
    def positions_RN(self) -> Int[Array, "R n"]:
        return self.grid([own.positions_BT for own in self.pieces])

    def grid(self, parts: list[Array]) -> Array:
        """Joins arrays ``[B, T, ...]``, one per piece, into a grid."""
        if len(parts) == 1:
            return parts[0]
        ranks, rest = self.tokens_BT.shape[0] // self.num_rows, parts[0].shape[2:]
        return jnp.concatenate([part.reshape(ranks, -1, *rest) for part in parts], axis=1)

    def cut(self, grid_RN: Array) -> list[Array]:
        """Cuts a grid into arrays ``[B, T, ...]``, one per piece."""
        if self.decoding is None:
            return [grid_RN]
        t, rest = self.tokens_BT.shape[1], grid_RN.shape[2:]
        b = grid_RN.shape[1] - self.num_rows * t
        return [grid_RN[:, :b].reshape(-1, 1, *rest), grid_RN[:, b:].reshape(-1, t, *rest)]
