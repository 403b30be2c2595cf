"""Types at the seams of expert offload, and its axis letters.

fMoE (Yu et al., "fMoE: Fine-Grained Expert Offloading for Large Mixture-of-Experts Serving", arXiv
2502.05370). An iteration is one decode step. Axes, in addition to those of ``jmoe.moe.types``:

L  MoE layers, before E (p_LE) and in ``policy``; elsewhere alone, as in ``jmoe.moe.types``, the experts
   of one rank
X  experts of all layers (L * E); expert e of layer l has the flat id ``l * E + e``
S  slots of the device's pool
C  entries of a store
A  layers ahead (the prefetch distance)
"""

from typing import Any, ClassVar, NamedTuple, Protocol, Self

from jax import Array
from jaxtyping import Bool, Float, Int


class StepView(NamedTuple):
    """The facts about a decode step that are known before its first layer.

    tokens_B: input token of each row.
    embeddings_BD: input embeddings of these tokens, float32.
    valid_B: whether the row is a token, not padding.
    seats_B: seat of each row's request: a number that the request keeps while it runs, less than the maximum
        number of running requests.
    """

    tokens_B: Int[Array, " B"]
    embeddings_BD: Float[Array, "B D"]
    valid_B: Bool[Array, " B"]
    seats_B: Int[Array, " B"]


class LayerView(NamedTuple):
    """Output of a layer's gate.

    scores_BE: router scores of each token.
    ids_BK: chosen experts, E for none.
    next_scores_BAE: scores that the routers of the next A layers give to this layer's input; None if the
        predictor does not use them.
    """

    scores_BE: Float[Array, "B E"]
    ids_BK: Int[Array, "B K"]
    next_scores_BAE: Float[Array, "B A E"] | None = None


class Forecast(NamedTuple):
    """The experts that the next A layers are expected to need.

    p_AE: how likely each expert is needed; for a batch, the maximum over its tokens.
    wanted_AE: whether each expert is worth fetching.
    """

    p_AE: Float[Array, "A E"]
    wanted_AE: Bool[Array, "A E"]


PredictorState = Any  # a pytree of arrays that only its own predictor reads


class Predictor(Protocol):
    """Predicts which experts the next layers will need. It is a pytree; what it learns is in its arrays.

    ``state`` is the predictor's own state inside one step. All functions are pure and run under jit;
    ``layer`` may be traced. Rows of a forecast that lie past the last layer are ignored.

    uses_next_routers: whether it needs the scores of the next layers' routers (``LayerView``).
    """

    uses_next_routers: ClassVar[bool]

    def start(self, view: StepView) -> tuple[PredictorState, Forecast]:
        """Returns the state and the forecast of layers 0 .. A - 1."""
        ...

    def observe(
        self, state: PredictorState, layer: Int[Array, ""], view: LayerView
    ) -> tuple[PredictorState, Forecast]:
        """Takes the gate's output at ``layer``; returns the state and the forecast of the A layers after
        it."""
        ...

    def finish(self, state: PredictorState) -> Self:
        """Returns the predictor with what it has learned from the step, after the last layer."""
        ...

    def add_prompts(self, seats_B: Int[Array, " B"], fresh_B: Bool[Array, " B"], counts_BLE: Array) -> Self:
        """Returns the predictor with what it has learned from pieces of prompts.

        seats_B: seat of each piece's request.
        fresh_B: whether the piece begins a request.
        counts_BLE: how often the piece chose each expert, float32.
        """
        ...
