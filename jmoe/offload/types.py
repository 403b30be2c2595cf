"""Types at the seams of expert offload, and its axis letters.

fMoE (Yu et al., "fMoE: Fine-Grained Expert Offloading for Large Mixture-of-Experts Serving", arXiv
2502.05370). Axes beside those of ``jmoe.moe.types``: L MoE layers, X experts of all layers (L * E, the flat
id of expert e of layer l being ``l * E + e``), S slots of the device's pool, C entries of a store, A layers
ahead (the prefetch distance). An iteration is one decode step.
"""

from typing import Any, NamedTuple, Protocol, Self

from jax import Array
from jaxtyping import Bool, Float, Int


class StepSeen(NamedTuple):
    """What is known of a decode step before its first layer.

    tokens_B: input tokens. embeddings_BD: their input embeddings, float32. valid_B: not padding. seats_B: a
    number that each running request keeps, below the most that run.
    """

    tokens_B: Int[Array, " B"]
    embeddings_BD: Float[Array, "B D"]
    valid_B: Bool[Array, " B"]
    seats_B: Int[Array, " B"]


class LayerSeen(NamedTuple):
    """What a layer's gate says.

    scores_BE: the router's scores of each token. ids_BK: the experts chosen, E for none. ahead_BAE: the
    scores that the routers of the next A layers give to this layer's input; None where no predictor asks
    for them.
    """

    scores_BE: Float[Array, "B E"]
    ids_BK: Int[Array, "B K"]
    ahead_BAE: Float[Array, "B A E"] | None = None


class Forecast(NamedTuple):
    """For each of the next A layers: p_AE, how likely each expert is needed (of a batch, by the token that
    likes it most); wanted_AE, which of them are worth fetching."""

    p_AE: Float[Array, "A E"]
    wanted_AE: Bool[Array, "A E"]


class Predictor(Protocol):
    """Says which experts the next layers will need. A pytree: what it learns is in its arrays.

    ``walk`` is a predictor's own state inside one step, a pytree of arrays. All functions are pure and run
    under jit; ``layer`` may be traced. Rows of a forecast that lie past the last layer are ignored.
    """

    def start(self, seen: StepSeen) -> tuple[Any, Forecast]:
        """The walk, and the forecast of layers 0 .. A - 1."""
        ...

    def observe(self, walk: Any, layer: Int[Array, ""], seen: LayerSeen) -> tuple[Any, Forecast]:
        """After the gate of ``layer``: the forecast of layers ``layer + 1 .. layer + A``."""
        ...

    def finish(self, walk: Any) -> Self:
        """What it has learned, after the last layer."""
        ...

    def absorb(self, seats_B: Int[Array, " B"], fresh_B: Bool[Array, " B"], counts_BLE: Array) -> Self:
        """What it has learned of pieces of prompts: how often each expert was chosen (float32).

        fresh_B: pieces that begin a request.
        """
        ...
