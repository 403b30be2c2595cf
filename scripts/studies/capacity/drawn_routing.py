"""Draws routing from published token-level counts, and limits it on ranks of their own tokens."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from shared.peaks import RANKS
from shared.published_routing import MODELS, SLOTS, files_by_domain, read_rows

from jmoe.config.techniques import CapacityConfig
from jmoe.moe.capacity import ExpertShard, limit
from jmoe.moe.types import Knobs, Routing, TokenFlags

# ---- published routing


@dataclass(frozen=True)
class Published:
    """The published routing of one model, domain and layer.

    often_V: the share of each token id that was seen.
    chosen_VE: how often a token of each id chose each expert (rows sum to k).
    k: the number of experts of a token.
    """

    often_V: Float[np.ndarray, " V"]
    chosen_VE: Float[np.ndarray, "V E"]
    k: int

    @classmethod
    def from_rows(cls, rows_N3: Int[np.ndarray, "N 3"], experts: int, k: int) -> Self:
        """Makes the routing from rows of (expert, token id, count)."""
        _, token_N = np.unique(rows_N3[:, 1], return_inverse=True)
        counts_VE = np.zeros((token_N.max() + 1, experts))
        np.add.at(counts_VE, (token_N, rows_N3[:, 0]), rows_N3[:, 2])
        seen_V = counts_VE.sum(1) / k
        return cls(seen_V / seen_V.sum(), counts_VE / seen_V[:, None], k)

    def draw(self, tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids_TK, scores_TE) of independent tokens.

        An expert is among a token's k with exactly its published frequency (systematic sampling over a random
        order of the experts). No router scores are published. The scores here are the frequencies, raised a
        little above 0, and the token's own choices get 1 more.
        """
        experts = self.chosen_VE.shape[1]
        chosen_TE = self.chosen_VE[rng.choice(len(self.often_V), tokens, p=self.often_V)]
        order_TE = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
        ends_TE = np.cumsum(np.take_along_axis(chosen_TE, order_TE, 1), 1) - rng.random((tokens, 1))
        # The n-th choice is the expert whose stretch of the line holds n; rounding must not lose the last.
        at_TK = (ends_TE[:, None, :] > np.arange(self.k)[None, :, None] + 1e-9).argmax(2)
        ids_TK = np.take_along_axis(order_TE, at_TK, 1)
        scores_TE = chosen_TE + 1e-3
        np.put_along_axis(scores_TE, ids_TK, 1 + np.take_along_axis(scores_TE, ids_TK, 1), 1)
        return ids_TK.astype(np.int32), (scores_TE / scores_TE.sum(1, keepdims=True)).astype(np.float32)


def read_published(routing: Path) -> dict[tuple[str, str], list[Published]]:
    """Returns the layers by (model, domain), from all ``token_expert`` files in the folder."""
    found = {}
    for model, (_, experts, k) in MODELS.items():
        for domain, path in files_by_domain(routing, model).items():
            rows = read_rows(path)
            layers = [Published.from_rows(rows[rows[:, 0] == s, 1:], experts, k) for s in range(len(SLOTS))]
            found[model, domain] = layers
    return found


# ---- the limit on ranks of their own tokens


@partial(jax.jit, static_argnames=("cfg", "ranks"))
def _limited(ids_RTK: Any, scores_RTE: Any, factor: Any, cfg: CapacityConfig, ranks: int) -> Any:
    tokens, experts = ids_RTK.shape[1], scores_RTE.shape[2]
    held = experts // ranks

    def one(rank: Any, ids_TK: Any, scores_TE: Any) -> Any:
        weights_TK = jnp.take_along_axis(scores_TE, ids_TK, 1)
        plain = Routing(ids_TK, weights_TK, scores_TE, jnp.log(scores_TE))
        seed = Knobs({}, jnp.zeros((), jnp.int32)).for_part(rank).seed
        flags = TokenFlags(jnp.ones(tokens, bool))
        shard = ExpertShard(rank * held, held)
        return limit(plain, flags, cfg, factor=factor, shard=shard, seed=seed)[0].ids_TK

    return jax.lax.map(lambda args: one(*args), (jnp.arange(ranks), ids_RTK, scores_RTE))


def limited_matrix(
    ids_RTK: np.ndarray, scores_RTE: np.ndarray, cfg: CapacityConfig | None, factor: float = 1.0
) -> Int[np.ndarray, "R E"]:
    """Returns the assignments that each rank's tokens send to each expert. None is plain top-k."""
    ranks, _, experts = scores_RTE.shape
    if cfg is not None:
        ids_RTK = np.asarray(_limited(ids_RTK, scores_RTE, np.float32(factor), cfg, ranks))
    return np.stack([np.bincount(ids.ravel(), minlength=experts + 1)[:experts] for ids in ids_RTK])


def draw_ranks(layer: Published, tokens: int, seed: int, ranks: int = RANKS) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids_RTK, scores_RTE) of ``tokens`` independent tokens on each rank."""
    rng = np.random.default_rng(seed)
    drawn = [layer.draw(tokens, rng) for _ in range(ranks)]
    return np.stack([d[0] for d in drawn]), np.stack([d[1] for d in drawn])
