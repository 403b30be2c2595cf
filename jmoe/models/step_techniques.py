"""The techniques in the layers of one step, so that the decoder's loop need not know them.

``Techniques`` lives while a step is traced. Before each layer it makes the ``Journey`` that the layer takes;
after the layer it collects what the layer did.
"""

from collections.abc import Sequence
from dataclasses import replace

from jax import Array
from jaxtyping import Float

from jmoe.models.journey import Journey, StepSettings
from jmoe.models.layer import DecoderLayer
from jmoe.models.predictor_views import add_prompts, routers_after
from jmoe.moe.orders import Hints, Move, Order
from jmoe.moe.shuffle import Shuffle
from jmoe.moe.types import MoEOutput
from jmoe.nn.sequences import Sequences
from jmoe.offload.cache import ExpertCache, Visit
from jmoe.offload.ranks import SAME


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
