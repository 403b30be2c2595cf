"""Decisions of the expert cache, without weights: what is copied where, what gives way.

Pure transitions of small arrays, in the array namespace of their arguments like ``slots`` and ``policy``:
inside the jitted step they move weights (``cache``), in the simulator they only count.
"""

from typing import Any, NamedTuple

from jmoe.offload import policy
from jmoe.offload.policy import Eviction, Outlook, Usage
from jmoe.offload.slots import Slots, claim, empty, land, pin, present, resident
from jmoe.offload.types import Forecast


class Rule(NamedTuple):
    """eviction: see ``policy``. copies: prefetches of one layer at most, the byte budget. ahead: layers that
    a forecast reaches."""

    eviction: Eviction
    copies: int
    ahead: int


class Table(NamedTuple):
    slots: Slots
    usage: Usage
    outlook: Outlook


class Moves(NamedTuple):
    """Experts to copy and the slots they go to: the first ``count`` of M, X and S in the others. evicted: how
    many held experts gave way."""

    experts_M: Any
    slots_M: Any
    count: Any
    evicted: Any


def new_table(slots: int, layers: int, experts: int, xp: Any) -> Table:
    """Of ``slots`` empty slots."""
    nothing = xp.zeros((layers, experts), dtype=xp.float32)
    outlook = Outlook(nothing, xp.zeros((layers, experts), dtype=bool), nothing)
    return Table(empty(slots, layers * experts, xp), policy.unused(layers * experts, xp), outlook)


def fill(table: Table, often_LE: Any) -> tuple[Table, Moves]:
    """A new table with as many experts as it has slots, those that are used most often."""
    xp = often_LE.__array_namespace__()
    (s,), often_X = table.slots.held_S.shape, often_LE.reshape(-1)
    first_M = xp.argsort(-often_X, stable=True)[:s].astype(xp.int32)
    table, moves = _claim(
        table,
        first_M,
        xp.ones(first_M.shape[0], dtype=xp.float32),
        xp.zeros(often_X.shape[0], dtype=xp.float32),
        False,
    )
    return table._replace(slots=land(table.slots)), moves


def foresee(table: Table, first: Any, forecast: Forecast) -> Table:
    """With a forecast of the layers from ``first`` on."""
    return table._replace(outlook=policy.look_ahead(table.outlook, first, *forecast))


def demand(table: Table, rule: Rule, needed_E: Any, layer: Any, most: int) -> tuple[Table, Moves]:
    """Slots for the experts that ``layer`` needs and that are not there, at most ``most``; all that it needs
    are pinned. Where slots run out some get none."""
    xp = needed_E.__array_namespace__()
    slots, (x,), e = table.slots, table.slots.slot_X.shape, needed_E.shape[0]
    layers = x // e
    at_L1 = (xp.arange(layers, dtype=xp.int32) == layer)[:, None]
    needed_X = (at_L1 & needed_E[None]).reshape(-1)
    slots = pin(slots, needed_X)
    experts_M, gain_M = policy.misses(needed_E, at(present(slots), layer, e), layer * e, most, x)
    worth_X = policy.worth(rule.eviction, table.usage, table.outlook, layer, rule.ahead)
    table, moves = _claim(table._replace(slots=slots), experts_M, gain_M, worth_X, False)
    return table._replace(slots=pin(land(table.slots), needed_X)), moves


def prefetch(table: Table, rule: Rule, layer: Any) -> tuple[Table, Moves]:
    """Slots, in flight, for the experts of the layers ahead that are most worth it."""
    worth_X = policy.worth(rule.eviction, table.usage, table.outlook, layer, rule.ahead)
    wishes = policy.next_wishes(
        worth_X, table.outlook, layer, present(table.slots), ahead=rule.ahead, count=rule.copies
    )
    return _claim(table, *wishes, worth_X, True)


def finish_layer(table: Table, needed_E: Any, scores_E: Any, layer: Any) -> Table:
    """What was in flight has landed, the layer's experts were used, nothing is pinned. scores_E: the gate's,
    of a batch the highest."""
    xp = needed_E.__array_namespace__()
    layers = table.outlook.p_LE.shape[0]
    used_X = ((xp.arange(layers, dtype=xp.int32) == layer)[:, None] & needed_E[None]).reshape(-1)
    usage = policy.use(table.usage, used_X & resident(table.slots))
    outlook = policy.warm(table.outlook, layer, scores_E)
    return Table(pin(land(table.slots), used_X & False), usage, outlook)


def places(table: Table, layer: Any, experts: int, nowhere: int) -> Any:
    """``[E]``, int32: the slot that holds each of a layer's experts, ready to be computed with; ``nowhere``
    where none does. Both halves of the table must say so: else the expert counts as lost, not as another."""
    slots, xp = table.slots, table.slots.held_S.__array_namespace__()
    slot_E = at(slots.slot_X, layer, experts)
    held_E = slots.held_S[xp.clip(slot_E, 0, slots.held_S.shape[0] - 1)]
    own_E = layer * experts + xp.arange(experts, dtype=xp.int32)
    ready_E = at(resident(slots), layer, experts) & (held_E == own_E)
    return xp.where(ready_E, slot_E, nowhere).astype(xp.int32)


def at(values_X: Any, layer: Any, experts: int) -> Any:
    """Of one layer: ``[E]``."""
    return values_X.reshape(-1, experts)[layer]


def _claim(table: Table, experts_M: Any, gain_M: Any, worth_X: Any, prefetched: bool) -> tuple[Table, Moves]:
    xp = experts_M.__array_namespace__()
    (s,), before_X = table.slots.held_S.shape, present(table.slots)
    slots, slots_M = claim(table.slots, experts_M, gain_M, worth_X)
    now_X = present(slots)
    usage = policy.arrive(table.usage, before_X, now_X, prefetched=prefetched)
    count = xp.sum(slots_M < s, dtype=xp.int32)
    evicted = xp.sum(before_X & ~now_X, dtype=xp.int32)
    return table._replace(slots=slots, usage=usage), Moves(experts_M, slots_M, count, evicted)
