"""The slot table, and its transitions: which expert is copied to which slot, and which is evicted.

Here are the decisions of the expert cache, without weights. They are pure functions of small arrays, in the
array namespace of their arguments like ``slots`` and ``policy``: inside the jitted step they move weights
(``cache``), in the simulator they only count.
"""

from typing import Any, NamedTuple

from jmoe.offload import policy
from jmoe.offload.policy import EvictionRule, Outlook, UseHistory
from jmoe.offload.slots import Slots, claim, empty, land, pin, present, resident
from jmoe.offload.types import Forecast


class CacheSettings(NamedTuple):
    """Settings of the decisions.

    rule: eviction rule, see ``policy.RULES``.
    max_prefetches: maximum number of prefetches in one layer, the byte budget.
    distance: number of layers that a forecast covers.
    """

    rule: EvictionRule
    max_prefetches: int
    distance: int


class SlotTable(NamedTuple):
    """The state of the decisions.

    slots: which expert each slot of the pool has.
    usage: how the experts were used.
    outlook: what is expected of them.
    """

    slots: Slots
    usage: UseHistory
    outlook: Outlook


class Copies(NamedTuple):
    """Experts to copy, and their slots.

    experts_M: flat ids of the experts. The first ``num_copies`` are copied; the others have no slot.
    slots_M: slot of each expert, S for none.
    num_copies: number of copies.
    num_evictions: number of experts evicted for them.
    """

    experts_M: Any
    slots_M: Any
    num_copies: Any
    num_evictions: Any


def new_table(slots: int, layers: int, experts: int, xp: Any) -> SlotTable:
    """Makes a table of ``slots`` empty slots."""
    nothing = xp.zeros((layers, experts), dtype=xp.float32)
    outlook = Outlook(nothing, xp.zeros((layers, experts), dtype=bool), nothing)
    return SlotTable(empty(slots, layers * experts, xp), policy.unused(layers * experts, xp), outlook)


def fill(table: SlotTable, loads_LE: Any) -> tuple[SlotTable, Copies]:
    """Fills a new table with the most often used experts, as many as it has slots."""
    xp = loads_LE.__array_namespace__()
    (s,), loads_X = table.slots.held_S.shape, loads_LE.reshape(-1)
    first_M = xp.argsort(-loads_X, stable=True)[:s].astype(xp.int32)
    table, copies = _claim(
        table,
        first_M,
        xp.ones(first_M.shape[0], dtype=xp.float32),
        xp.zeros(loads_X.shape[0], dtype=xp.float32),
        False,
    )
    return table._replace(slots=land(table.slots)), copies


def set_forecast(table: SlotTable, first_layer: Any, forecast: Forecast) -> SlotTable:
    """Returns the table with a forecast of the layers from ``first_layer`` on."""
    return table._replace(outlook=policy.set_forecast(table.outlook, first_layer, *forecast))


def demand(
    table: SlotTable, settings: CacheSettings, needed_E: Any, layer: Any, max_experts: int
) -> tuple[SlotTable, Copies]:
    """Claims slots for the experts that ``layer`` needs and the pool lacks, at most ``max_experts``, and pins
    all that it needs. If slots run out, some experts get none."""
    xp = needed_E.__array_namespace__()
    slots, (x,), e = table.slots, table.slots.slot_X.shape, needed_E.shape[0]
    layers = x // e
    at_L1 = (xp.arange(layers, dtype=xp.int32) == layer)[:, None]
    needed_X = (at_L1 & needed_E[None]).reshape(-1)
    slots = pin(slots, needed_X)
    experts_M, gain_M = policy.misses(needed_E, at_layer(present(slots), layer, e), layer * e, max_experts, x)
    worth_X = settings.rule(table.usage, table.outlook, layer, settings.distance)
    table, copies = _claim(table._replace(slots=slots), experts_M, gain_M, worth_X, False)
    return table._replace(slots=pin(land(table.slots), needed_X)), copies


def prefetch(table: SlotTable, settings: CacheSettings, layer: Any) -> tuple[SlotTable, Copies]:
    """Claims slots, in flight, for the most worthwhile experts of the layers ahead."""
    worth_X = settings.rule(table.usage, table.outlook, layer, settings.distance)
    experts_M, gain_M = policy.best_prefetches(
        worth_X, table.outlook, layer, present(table.slots),
        distance=settings.distance, count=settings.max_prefetches,
    )  # fmt: skip
    return _claim(table, experts_M, gain_M, worth_X, True)


def finish_layer(table: SlotTable, needed_E: Any, scores_E: Any, layer: Any) -> SlotTable:
    """Returns the table after ``layer``: all copies have landed, the layer's experts were used, nothing is
    pinned.

    scores_E: gate's score of each expert, the highest of the batch.
    """
    xp = needed_E.__array_namespace__()
    layers = table.outlook.p_LE.shape[0]
    used_X = ((xp.arange(layers, dtype=xp.int32) == layer)[:, None] & needed_E[None]).reshape(-1)
    usage = policy.use(table.usage, used_X & resident(table.slots))
    outlook = policy.add_scores(table.outlook, layer, scores_E)
    return SlotTable(pin(land(table.slots), used_X & False), usage, outlook)


def slots_of_layer(table: SlotTable, layer: Any, experts: int, no_slot: int) -> Any:
    """Returns the slot from which each of a layer's experts can run, or ``no_slot`` if there is none:
    ``[E]``, int32.

    Both halves of the table must agree: if not, the expert counts as absent, so that no other runs for it.
    """
    slots, xp = table.slots, table.slots.held_S.__array_namespace__()
    slot_E = at_layer(slots.slot_X, layer, experts)
    held_E = slots.held_S[xp.clip(slot_E, 0, slots.held_S.shape[0] - 1)]
    own_E = layer * experts + xp.arange(experts, dtype=xp.int32)
    ready_E = at_layer(resident(slots), layer, experts) & (held_E == own_E)
    return xp.where(ready_E, slot_E, no_slot).astype(xp.int32)


def at_layer(values_X: Any, layer: Any, experts: int) -> Any:
    """Returns the values of one layer: ``[E]``."""
    return values_X.reshape(-1, experts)[layer]


def _claim(
    table: SlotTable, experts_M: Any, gain_M: Any, worth_X: Any, is_prefetch: bool
) -> tuple[SlotTable, Copies]:
    xp = experts_M.__array_namespace__()
    (s,), had_slot_X = table.slots.held_S.shape, present(table.slots)
    slots, slots_M = claim(table.slots, experts_M, gain_M, worth_X)
    has_slot_X = present(slots)
    usage = policy.arrive(table.usage, had_slot_X, has_slot_X, is_prefetch=is_prefetch)
    count = xp.sum(slots_M < s, dtype=xp.int32)
    evicted = xp.sum(had_slot_X & ~has_slot_X, dtype=xp.int32)
    return table._replace(slots=slots, usage=usage), Copies(experts_M, slots_M, count, evicted)
