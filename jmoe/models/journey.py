"""The data that the techniques pass to a layer, and the settings that a step passes to them
(``step_techniques``).

The layers of one kind take journeys of one structure, therefore they are traced once.
"""

from dataclasses import dataclass

import jax

from jmoe.moe.orders import Hints, Order, ShuffleTables
from jmoe.moe.routing import RouterWeights
from jmoe.moe.types import Knobs
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
    """The data that the techniques pass to one layer; a field is None if its technique is off.

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
