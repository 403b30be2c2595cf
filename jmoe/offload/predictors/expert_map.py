"""``ExpertMaps``: fMoE's forecast, the experts of the past iteration that is most similar to this one.

Section 2.3: before the first layer an iteration is compared by its input embedding (semantic search), later
by the gate scores so far (trajectory search). Here the embeddings are those of single tokens: if the store
has the token, the nearest entry is an iteration of the same token.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jmoe.offload.predictors.base import BasePredictor, PredictorInputs, PredictorSizes
from jmoe.offload.predictors.forecasts import over_batch, until
from jmoe.offload.predictors.history import History
from jmoe.offload.predictors.map_store import EXACT, MapStore, cosine, put, redundancy, unit
from jmoe.offload.types import Forecast, LayerView, StepView


class KeptIteration(NamedTuple):
    """The one iteration of a step that will be kept.

    row: its row in the batch.
    exists: whether there is one.
    key_D: its input embedding, of length 1.
    cos_C: cosines of that embedding and every entry's.
    map_LE: its map as far as it is known.
    """

    row: Int[Array, ""]
    exists: Bool[Array, ""]
    key_D: Float[Array, " D"]
    cos_C: Float[Array, " C"]
    map_LE: Float[Array, "L E"]


class Trajectories(NamedTuple):
    """The predictor's state in one step: the trajectories up to a layer, compared with every entry's.

    They are kept as running sums for their cosines.

    valid_B: whether the row is a token whose numbers so far are all finite.
    dots_BC: dot product of each token's trajectory and each entry's.
    squares_B: squared length of each token's trajectory.
    entry_squares_C: squared length of each entry's trajectory.
    kept: the iteration that will be kept; None if the store does not learn online.
    """

    valid_B: Bool[Array, " B"]
    dots_BC: Float[Array, "B C"]
    squares_B: Float[Array, " B"]
    entry_squares_C: Float[Array, " C"]
    kept: KeptIteration | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertMaps(BasePredictor):
    """Predicts by the most similar past iteration. From prompts it learns nothing: a prompt gives counts, not
    the distributions of single tokens.

    store: past iterations.
    turn: number of steps so far.
    distance: A, layers ahead.
    k: experts per token; never fewer are wanted.
    is_online: whether every step adds an iteration to the store.
    """

    store: MapStore
    turn: Int[Array, ""]
    distance: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})
    is_online: bool = field(metadata={"static": True})

    @classmethod
    def from_inputs(cls, sizes: PredictorSizes, inputs: PredictorInputs) -> Self:
        """Makes the predictor; without a profile its store begins empty."""
        if inputs.embeddings_VD is None:
            raise ValueError("expert_map needs the model's input embeddings")
        width, profile = inputs.embeddings_VD.shape[1], inputs.profile
        if profile is None:
            store = MapStore.empty(sizes.store_size, sizes.layers, sizes.experts, width)
        else:
            store = _filled_store(profile, inputs.embeddings_VD, sizes.store_size, sizes.distance)
        is_online = profile is None if inputs.is_online is None else inputs.is_online
        return cls.make(store, distance=sizes.distance, k=sizes.k, is_online=is_online)

    @classmethod
    def make(cls, store: MapStore, *, distance: int, k: int, is_online: bool) -> Self:
        return cls(store, jnp.zeros((), jnp.int32), distance, k, is_online)

    @classmethod
    def store_bytes(cls, *, layers: int, experts: int, width: int, store_size: int) -> int:
        return 4 * store_size * (layers * experts + width)  # float32 numbers

    def start(self, view: StepView) -> tuple[Trajectories, Forecast]:
        (b, _), store_size = view.embeddings_BD.shape, self.store.used_C.shape[0]
        finite_B = jnp.all(jnp.isfinite(view.embeddings_BD), 1)
        valid_B, keys_BD = view.valid_B & finite_B, jnp.where(finite_B[:, None], unit(view.embeddings_BD), 0)
        cos_BC = jnp.matmul(keys_BD, self.store.keys_CD.T, precision=EXACT)
        state = Trajectories(
            valid_B,
            jnp.zeros((b, store_size), jnp.float32),
            jnp.zeros(b, jnp.float32),
            jnp.zeros(store_size, jnp.float32),
            self._choose(valid_B, keys_BD, cos_BC) if self.is_online else None,
        )
        return state, self._forecast(cos_BC, 0, valid_B)

    def observe(
        self, state: Trajectories, layer: Int[Array, ""], view: LayerView
    ) -> tuple[Trajectories, Forecast]:
        """Adds the layer's part to every cosine: the same work at every depth, O(B * C * E).

        The paper forecasts only layer ``layer + A`` here; our rows of the nearer layers refresh the forecasts
        of earlier searches. A token whose scores are not all finite is left out from here on.
        """
        maps_CE = lax.dynamic_index_in_dim(self.store.maps_CLE, layer, 1, keepdims=False)
        squares_C = lax.dynamic_index_in_dim(self.store.squares_CL, layer, 1, keepdims=False)
        kept, finite_B = state.kept, jnp.all(jnp.isfinite(view.scores_BE), 1)
        if kept is not None:  # scores unchanged: the store takes no map with numbers that are not finite
            kept = kept._replace(map_LE=kept.map_LE.at[layer].set(view.scores_BE[kept.row]))
        scores_BE = jnp.where(finite_B[:, None], view.scores_BE, 0)
        state = state._replace(
            valid_B=state.valid_B & finite_B,
            dots_BC=state.dots_BC + jnp.matmul(scores_BE, maps_CE.T, precision=EXACT),
            squares_B=state.squares_B + jnp.sum(scores_BE * scores_BE, 1),
            entry_squares_C=state.entry_squares_C + squares_C,
            kept=kept,
        )
        cos_BC = cosine(state.dots_BC, state.squares_B[:, None], state.entry_squares_C[None])
        return state, self._forecast(cos_BC, layer + 1, state.valid_B)

    def finish(self, state: Trajectories) -> Self:
        """Keeps one iteration per step, however many tokens it had (ours). The cost is bounded and small: the
        entry is compared by the cosines that the step's searches have computed."""
        kept = state.kept
        if kept is None:
            return self
        dots_C, square = state.dots_BC[kept.row], state.squares_B[kept.row]
        trajectory_C = cosine(dots_C, square, state.entry_squares_C)
        redundancy_C = redundancy(kept.cos_C, trajectory_C, self.distance, len(kept.map_LE))
        store = put(self.store, kept.key_D, kept.map_LE, redundancy_C, kept.exists)
        return replace(self, store=store, turn=self.turn + 1)

    def _choose(self, valid_B: Array, keys_BD: Array, cos_BC: Array) -> KeptIteration:
        """Chooses the iteration to keep: the valid rows take turns over the steps."""
        count = jnp.sum(valid_B, dtype=jnp.int32)
        nth = self.turn % jnp.maximum(count, 1) + 1
        row = jnp.argmax(jnp.cumsum(valid_B, dtype=jnp.int32) == nth).astype(jnp.int32)
        map_LE = jnp.zeros(self.store.maps_CLE.shape[1:], jnp.float32)
        return KeptIteration(row, count > 0, keys_BD[row], cos_BC[row], map_LE)

    def _forecast(
        self, cos_BC: Float[Array, "B C"], first_layer: int | Int[Array, ""], valid_B: Bool[Array, " B"]
    ) -> Forecast:
        """Forecasts the layers from ``first_layer`` on by each token's most similar entry; the less similar
        it is, the more experts are wanted (section 2.4). An empty store forecasts nothing."""
        used_C, maps_CLE = self.store.used_C, self.store.maps_CLE
        layers = maps_CLE.shape[1]
        cos_BC = jnp.where(used_C[None], cos_BC, -jnp.inf)
        score_B1, best_B1 = lax.top_k(cos_BC, 1)
        layer_A = first_layer + jnp.arange(self.distance)
        p_BAE = maps_CLE[best_B1, jnp.minimum(layer_A, layers - 1)[None]]
        mass_BA = jnp.broadcast_to(jnp.clip(1 - score_B1, 0, 1), p_BAE.shape[:2])
        known_1A1 = ((layer_A < layers) & jnp.any(used_C))[None, :, None]
        wanted_BAE = until(p_BAE, mass_BA, self.k) & known_1A1
        return over_batch(p_BAE * known_1A1.astype(p_BAE.dtype), wanted_BAE, valid_B)


def _filled_store(
    profile: History, embeddings_VD: Array | np.ndarray, store_size: int, distance: int
) -> MapStore:
    """Fills a store with the profile's single iterations, in random order: they are in the order of the text,
    and if there are more than the store holds, the last domain would fill most of it."""
    tokens_QM, maps_QMLE = profile.sample.map_tokens_QM, profile.sample.maps_QMLE
    there_QM = tokens_QM >= 0
    order_I = np.random.default_rng(0).permutation(int(there_QM.sum()))
    embeddings_ID = np.asarray(embeddings_VD)[tokens_QM[there_QM][order_I]].astype(np.float32)
    maps_ILE = maps_QMLE[there_QM][order_I].astype(np.float32)
    return MapStore.build(embeddings_ID, maps_ILE, store_size, distance)
