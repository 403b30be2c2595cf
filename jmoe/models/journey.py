"""What the techniques carry through the layers of one step, so that the decoder's loop need not know them.

``Techniques`` lives while a step is traced. Before each layer it makes the ``Journey`` that the layer takes;
after the layer it collects what the layer did. The layers of one kind take journeys of one structure,
therefore they are traced once.
"""

from dataclasses import dataclass, replace

import jax
from jax import Array
from jaxtyping import Float

from jmoe.moe.orders import Hints, Move, Order, ShuffleTables
from jmoe.moe.routing import RouterWeights
from jmoe.moe.shuffle import Shuffle
from jmoe.moe.types import Knobs, MoEOutput
from jmoe.nn.norm import NormWeights
from jmoe.offload.cache import Visit


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepSettings:
    """The settings of the techniques in one step.

    knobs: settings of the lossy techniques; None switches all of them off.
    tables: tables by which tokens are shuffled, one per layer with experts; None leaves every token on its
        rank.
    """

    knobs: Knobs | None = None
    tables: list[ShuffleTables] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterAhead:
    """The parts that run a later layer's router on rows of this layer: the norm before that layer's experts,
    and the router."""

    norm: NormWeights
    router: RouterWeights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Journey:
    """What the techniques pass to one layer; a field is None if its technique is off.

    knobs: settings of the lossy techniques, with this layer's own seed.
    order: order of the incoming rows.
    hints: what the order after attention is predicted from; without them the order stays.
    visit: access to the expert cache; None in a layer without experts.
    next_routers: routers of the next layers, if the cache's predictor uses them.
    """

    knobs: Knobs | None = None
    order: Order | None = None
    hints: Hints | None = None
    visit: Visit | None = None
    next_routers: list[RouterAhead] | None = None


class Techniques:
    """The techniques on their way through the layers of one step; for use under jit.

    outputs: what each layer with experts did so far, in the tokens' original order.
    visit: access to the expert cache after the last layer so far; None if no experts are offloaded.
    """

    def __init__(self, settings: StepSettings, shuffle: Shuffle, num_tokens: int, visit: Visit | None):
        self.outputs: list[MoEOutput] = []
        self.visit = visit
        self._settings, self._shuffle = settings, shuffle
        self._start = self._order = shuffle.original_order(num_tokens) if settings.tables else None
        self._history: list[Array] = []  # rank of each token's experts, by layer, if a table needs it

    def journey(self, *, has_experts: bool, next_routers: list[RouterAhead] | None) -> Journey:
        """Makes the journey of the next layer.

        next_routers: routers of the layers after it, see ``Journey``.
        """
        knobs, tables, layer = self._settings.knobs, self._settings.tables, len(self.outputs)
        return Journey(
            knobs=None if knobs is None else knobs.for_part(layer),
            order=self._order,
            hints=Hints.make(tables[layer], self._history) if tables and has_experts else None,
            visit=self.visit if has_experts else None,
            next_routers=next_routers if has_experts else None,
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
