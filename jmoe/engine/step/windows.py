"""Whole windows of tokens, without KV pages: their logits, and the choices of the routers in them."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from jmoe.mesh import replicated
from jmoe.models.decoder import Decoder
from jmoe.moe.types import Routing
from jmoe.nn.sequences import Sequences
from jmoe.offload.cache import ExpertCache


def window_length(tokens: int, ranks: int, min_length: int = 1) -> int:
    """Returns the length to which a window of ``tokens`` is padded.

    It is the next power of two, so that few shapes compile, or ``min_length`` if that is more, rounded up to
    a multiple of ``ranks``, the number of ranks that split a sequence's tokens.
    """
    length = max(min_length, 1 << (tokens - 1).bit_length())
    return -(-length // ranks) * ranks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WindowRouting:
    """The routing of B windows of T positions in L layers. Values at padding, and at picks of -1, mean
    nothing.

    ids_LBTK: ids of the chosen experts.
    weights_LBTK: combine weights of these experts.
    gates_LBE: mean of each window's router scores.
    embeddings_BD: mean of each window's input embeddings.
    maps_BMLE: router scores at M picked positions.
    """

    ids_LBTK: Array
    weights_LBTK: Array
    gates_LBE: Array
    embeddings_BD: Array
    maps_BMLE: Array


def summarize(model: Decoder, seqs: Sequences, picks_BM: Array, routing: list[Routing]) -> WindowRouting:
    """Summarizes ``routing``, one per layer, over whole windows. The function is for use under jit."""
    b, t = seqs.tokens_BT.shape
    valid_BT1 = (seqs.positions_BT >= 0)[:, :, None]

    def mean(values_BTX: Array) -> Array:
        """Returns the mean over each window's valid tokens."""
        count_B1 = jnp.maximum(jnp.sum(valid_BT1, 1, dtype=jnp.float32), 1.0)
        return jnp.sum(jnp.where(valid_BT1, values_BTX, 0.0), 1) / count_B1

    def picked(scores_TE: Array) -> Array:
        return jnp.take_along_axis(scores_TE.reshape(b, t, -1), jnp.maximum(picks_BM, 0)[:, :, None], 1)

    return WindowRouting(
        jnp.stack([r.ids_TK.reshape(b, t, -1) for r in routing]),
        jnp.stack([r.weights_TK.reshape(b, t, -1) for r in routing]),
        jnp.stack([mean(r.scores_TE.reshape(b, t, -1)) for r in routing]),
        mean(model.embed[...][seqs.tokens_BT].astype(jnp.float32)),
        jnp.stack([picked(r.scores_TE) for r in routing], 2),
    )


@dataclass(frozen=True)
class WindowFunctions:
    """The functions of windows that are jitted, over a model's flat list of weights.

    merge: function that makes the model from its weights (``ModelFunctions.merge``).
    """

    merge: Callable[[list[Array]], Decoder]

    def logits(
        self, weights: list[Array], tokens_BT: Array, positions_BT: Array, cache: ExpertCache | None
    ) -> Array:
        """Returns the ``[B, T, V]`` logits of whole windows."""
        model = self.merge(weights)
        out = model(Sequences(tokens_BT, positions_BT), cache=cache)
        return replicated(model.logits(out.hidden_RND), model.mesh)

    def routing(
        self,
        weights: list[Array],
        tokens_BT: Array,
        positions_BT: Array,
        picks_BM: Array,
        cache: ExpertCache | None,
    ) -> WindowRouting:
        """Returns the choices of all layers' routers in whole windows.

        picks_BM: positions whose scores are returned; -1 for none. The scores of all positions would be many
            times as large as everything else.
        """
        model, seqs = self.merge(weights), Sequences(tokens_BT, positions_BT)
        return replicated(summarize(model, seqs, picks_BM, model(seqs, cache=cache).routing), model.mesh)
