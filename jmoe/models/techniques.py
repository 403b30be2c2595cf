"""The techniques in the layers of one step, so that the decoder's loop need not know them.

``Techniques`` lives while a step is traced. Before each layer it makes the ``Journey`` that the layer takes;
after the layer it collects what the layer did. The functions after it show a predictor of offloaded experts
what it learns from; the executor that the host drives (``jmoe.engine.offload``) uses them too.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jmoe.models.journey import Journey, RouterAhead, StepSettings
from jmoe.models.layer import DecoderLayer, router_ahead
from jmoe.moe.orders import Hints, Move, Order
from jmoe.moe.shuffle import Shuffle
from jmoe.moe.types import MoEOutput, Routing
from jmoe.nn.sequences import Sequences
from jmoe.offload.cache import ExpertCache, Visit
from jmoe.offload.predictors.make import PREDICTORS
from jmoe.offload.ranks import SAME
from jmoe.offload.types import Predictor, StepView


class Techniques:
    """The techniques in the layers of one step; for use under jit.

    outputs: what each layer with experts did so far, in the tokens' original order.
    visit: access to the expert cache after the last layer so far; None if no experts are offloaded.
    """

    def __init__(
        self,
        settings: StepSettings,
        shuffle: Shuffle,
        layers: Sequence[DecoderLayer],
        seqs: Sequences,
        num_tokens: int,
        visit: Visit | None,
    ):
        self.outputs: list[MoEOutput] = []
        self.visit = visit
        self._settings, self._shuffle, self._layers, self._seqs = settings, shuffle, layers, seqs
        self._start = self._order = shuffle.original_order(num_tokens) if settings.tables else None
        self._history: list[Array] = []  # rank of each token's experts, by layer, if a table needs it

    def journey(self, i: int) -> Journey:
        """Makes the journey of layer ``i``, the next one."""
        has_experts = self._layers[i].moe is not None
        next_routers = routers_after(self._layers, i) if self._seqs.phase == "decode" else None
        knobs, tables, layer = self._settings.knobs, self._settings.tables, len(self.outputs)
        return Journey(
            knobs=None if knobs is None else knobs.for_part(layer),
            order=self._order,
            hints=Hints.make(tables[layer], self._history) if tables and has_experts else None,
            visit=self.visit if has_experts else None,
            next_routers=next_routers,
        )

    def collect(self, out: MoEOutput | None, order: Order | None) -> None:
        """Takes what a layer did.

        out: output of the layer's experts; None for a layer without experts.
        order: order of its rows.
        """
        self._order = order
        if out is None:
            return
        assert out.source is None or isinstance(out.source, Visit), "a visit comes back as a visit"
        self.visit, out = out.source, replace(out, source=None)
        tables = self._settings.tables
        if tables and order is not None:
            following = len(self.outputs) + 1
            needs = following < len(tables) and tables[following].history_shares_HR is not None
            out, rank_N = self._shuffle.report(out, order, history=needs)
            self._history += [] if rank_N is None else [rank_N]
            if self.visit is not None:
                routing = self._shuffle.gather_original(replace(out.routing, plan=None), order)
                out = replace(out, routing=routing)
        self.outputs.append(out)

    def to_original_order(self, x_ND: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """Returns the rows after the last layer in their original order."""
        if self._order is None or self._start is None:
            return x_ND
        return self._shuffle.move(x_ND, Move(self._order, self._start))

    def final_cache(self) -> ExpertCache | None:
        """Returns the expert cache after the last layer, or None if no experts are offloaded."""
        if self.visit is None:
            return None
        cache = self.visit.end()
        predictor = add_prompts(cache.predictor, self._seqs, [out.routing for out in self.outputs])
        return replace(cache, predictor=cache.ranks.constrain(predictor, SAME))


def step_view(seqs: Sequences, x_ND: Float[Array, "N D"]) -> StepView | None:
    """Returns what a predictor sees of a decode step before the first layer, or None for a prefill."""
    if seqs.phase != "decode":
        return None
    seats_B = jnp.zeros(len(seqs.tokens_BT), jnp.int32) if seqs.seats_B is None else seqs.seats_B
    return StepView(seqs.tokens_BT[:, 0], x_ND, seqs.positions_BT[:, 0] >= 0, seats_B)


def routers_after(layers: Sequence[DecoderLayer], i: int) -> list[RouterAhead] | None:
    """Returns the routers of the next layers with experts after layer ``i``, as many as the predictor looks
    ahead; after the last such layer, that layer repeats. It returns None if the layer has no experts or the
    predictor does not use them."""
    experts = layers[i].moe
    offload = None if experts is None else experts.moe.offload
    if offload is None or not PREDICTORS[offload.predictor].uses_next_routers:
        return None
    later = [layer for j, layer in enumerate(layers) if j > i and layer.moe is not None] or [layers[i]]
    return [router_ahead(later[min(a, len(later) - 1)]) for a in range(offload.prefetch_distance)]


def add_prompts(predictor: Predictor, seqs: Sequences, routing: list[Routing]) -> Predictor:
    """Returns the predictor after it has learned what prompts chose; from decode steps it learns layer by
    layer (``Predictor.observe``).

    routing: the router's own choices, one entry per layer with experts.
    """
    if seqs.phase == "decode" or seqs.seats_B is None:
        return predictor
    (b, _), grid, experts = seqs.tokens_BT.shape, seqs.positions_RN.shape, routing[0].scores_TE.shape[1]
    valid_BTK = (seqs.positions_BT >= 0)[..., None]
    rows_B1 = jnp.arange(b)[:, None]

    def counts(ids_NK: Array) -> Array:
        ids_BTK = seqs.cut(ids_NK.reshape(*grid, -1))[-1]
        ids_BN = jnp.where(valid_BTK, ids_BTK, experts).reshape(b, -1)
        return jnp.zeros((b, experts), jnp.float32).at[rows_B1, ids_BN].add(1.0, mode="drop")

    counts_BLE = jnp.stack([counts(r.ids_TK) for r in routing], axis=1)
    fresh_B = seqs.positions_BT[:, 0] == 0 if seqs.fresh_B is None else seqs.fresh_B
    return predictor.add_prompts(seqs.seats_B, fresh_B, counts_BLE)
