"""The worth of an expert, which decides which slot is evicted first and which expert is fetched next.

The eviction rule gives one scale for both. ``RULES`` has the rules by their names in the config; a rule is a
function from the use history and the outlook to the worth of every expert.

``expected_use``  p / (layers until its layer comes), for every expert (ours): p is the forecast if there is
                  one, and at least the expert's heat, the running mean of its layer's gate scores. This is
                  Belady's order, with likely uses in place of known ones.

The other rules have two ranges. An expert that the forecast wants soon is worth its prefetch priority
p / (l - l_now), above 0 (fMoE, section 4.3); any other expert is worth less than 0:

``expert_map``    -1 / (p * visits), the negative of fMoE's eviction priority (section 4.4); p is the latest
                  forecast of the expert, visits count since it came in, both with a small lower limit
``lru``           -(layers visited since its last use)
``lfu``           -1 / visits since it came in

A demand takes the slots of the experts that are worth least; a prefetch takes only the slot of an expert
worth less than itself (ours: a forecast of nothing must not evict a good expert).
"""

from typing import Any, NamedTuple, Protocol

from jmoe.config.techniques import Eviction
from jmoe.offload.slots import NEEDED

NEGLIGIBLE = 1e-30  # values below it count as 0; products with it are not denormal yet
LEAST = 1e-6  # stands for a forecast of 0, so that visits still rank
DECAY = 0.9  # share of the heat kept from one step to the next: a memory of ten steps


class UseHistory(NamedTuple):
    """The past use of the experts.

    visits_X: number of uses since the expert came in, float32.
    last_X: clock at its last use.
    clock: number of layers visited, int32.
    fetched_X: whether the expert came by a prefetch and was not used yet.
    """

    visits_X: Any
    last_X: Any
    clock: Any
    fetched_X: Any


class Outlook(NamedTuple):
    """The expected use of the experts.

    p_LE: latest forecast of every layer.
    wanted_LE: whether that forecast found the expert worth fetching.
    heat_LE: running mean of the gate's scores, the highest of each batch.
    """

    p_LE: Any
    wanted_LE: Any
    heat_LE: Any


def unused(experts: int, xp: Any) -> UseHistory:
    zeros_X = xp.zeros(experts, dtype=xp.int32)
    none_X = xp.zeros(experts, dtype=bool)
    return UseHistory(xp.zeros(experts, dtype=xp.float32), zeros_X, xp.zeros((), dtype=xp.int32), none_X)


def arrive(usage: UseHistory, had_slot_X: Any, has_slot_X: Any, *, is_prefetch: bool) -> UseHistory:
    """Returns the usage after a claim: a new expert has no visits, and its last use is now."""
    xp = has_slot_X.__array_namespace__()
    new_X = has_slot_X & ~had_slot_X
    fetched_X = (usage.fetched_X & has_slot_X) | new_X if is_prefetch else usage.fetched_X & has_slot_X
    return UseHistory(
        xp.where(new_X, 0.0, usage.visits_X).astype(xp.float32),
        xp.where(new_X, usage.clock, usage.last_X).astype(xp.int32),
        usage.clock,
        fetched_X,
    )


def use(usage: UseHistory, needed_X: Any) -> UseHistory:
    """Returns the usage after a layer: its experts were visited."""
    xp = needed_X.__array_namespace__()
    return UseHistory(
        usage.visits_X + needed_X.astype(xp.float32),
        xp.where(needed_X, usage.clock, usage.last_X).astype(xp.int32),
        (usage.clock + 1).astype(xp.int32),
        usage.fetched_X & ~needed_X,
    )


def set_forecast(outlook: Outlook, first_layer: Any, p_AE: Any, wanted_AE: Any) -> Outlook:
    """Returns the outlook with a forecast of the layers from ``first_layer`` on. Rows past the last layer are
    dropped; numbers that are not finite count as 0."""
    xp = p_AE.__array_namespace__()
    p_AE, wanted_AE = finite(p_AE), wanted_AE & xp.isfinite(p_AE)
    a = p_AE.shape[0]
    row_L = xp.arange(outlook.p_LE.shape[0], dtype=xp.int32) - first_layer
    covered_L1 = ((row_L >= 0) & (row_L < a))[:, None]
    row_L = xp.clip(row_L, 0, a - 1)
    p_LE = xp.where(covered_L1, p_AE[row_L], outlook.p_LE)
    return outlook._replace(p_LE=p_LE, wanted_LE=xp.where(covered_L1, wanted_AE[row_L], outlook.wanted_LE))


def add_scores(outlook: Outlook, layer: Any, scores_E: Any) -> Outlook:
    """Returns the outlook with a layer's gate scores in the running mean. The mean outlives the request, so
    numbers that are not finite count as 0."""
    xp = scores_E.__array_namespace__()
    at_L1 = (xp.arange(outlook.heat_LE.shape[0], dtype=xp.int32) == layer)[:, None]
    heat_LE, scores_E = finite(outlook.heat_LE), finite(scores_E)
    heat_LE = xp.where(at_L1, DECAY * heat_LE + (1 - DECAY) * scores_E[None], heat_LE)
    return outlook._replace(heat_LE=heat_LE.astype(xp.float32))


def finite(p_Z: Any) -> Any:
    """Returns scores or forecasts with 0 for numbers that are not finite, and for numbers so small that some
    hardware would make them 0 and other would not."""
    xp = p_Z.__array_namespace__()
    return xp.where(xp.isfinite(p_Z) & (xp.abs(p_Z) >= NEGLIGIBLE), p_Z, xp.zeros((), dtype=p_Z.dtype))


class EvictionRule(Protocol):
    def __call__(self, usage: UseHistory, outlook: Outlook, layer: Any, distance: int, /) -> Any:
        """Returns the worth of every expert while ``layer`` runs (-1: before the first layer), ``[X]``,
        float32.

        distance: how many layers have a forecast from this step.
        """
        ...


def expected_use(usage: UseHistory, outlook: Outlook, layer: Any, distance: int) -> Any:
    """Ranks by how likely and how soon the next use is."""
    xp, until_L1, soon_L1 = _layers_ahead(outlook, layer, distance)
    forecast_LE = xp.where(soon_L1, outlook.p_LE, xp.zeros((), dtype=xp.float32))
    comes_L1 = xp.where(until_L1 > 0, until_L1, until_L1 + outlook.p_LE.shape[0]).astype(xp.float32)
    return (xp.maximum(forecast_LE, outlook.heat_LE) / comes_L1).reshape(-1)


def expert_map(usage: UseHistory, outlook: Outlook, layer: Any, distance: int) -> Any:
    """Ranks by the latest forecast and the visits together (fMoE)."""
    xp = usage.visits_X.__array_namespace__()
    rest_X = -1.0 / (xp.clip(outlook.p_LE.reshape(-1), LEAST, None) * _visits_since_arrival(usage))
    return _priority_or(rest_X, outlook, layer, distance)


def lru(usage: UseHistory, outlook: Outlook, layer: Any, distance: int) -> Any:
    """Ranks by the last use."""
    xp = usage.visits_X.__array_namespace__()
    return _priority_or((usage.last_X - usage.clock - 1).astype(xp.float32), outlook, layer, distance)


def lfu(usage: UseHistory, outlook: Outlook, layer: Any, distance: int) -> Any:
    """Ranks by the number of uses."""
    return _priority_or(-1.0 / _visits_since_arrival(usage), outlook, layer, distance)


RULES: dict[Eviction, EvictionRule] = {
    "expected_use": expected_use,
    "expert_map": expert_map,
    "lru": lru,
    "lfu": lfu,
}


def _layers_ahead(outlook: Outlook, layer: Any, distance: int) -> tuple[Any, Any, Any]:
    """Returns the array namespace, the number of layers until each layer comes, 0 or less if it was, and
    whether the layer has a forecast from this step."""
    xp = outlook.p_LE.__array_namespace__()
    until_L1 = (xp.arange(outlook.p_LE.shape[0], dtype=xp.int32) - layer)[:, None]
    return xp, until_L1, (until_L1 > 0) & (until_L1 <= distance)


def _visits_since_arrival(usage: UseHistory) -> Any:
    """Returns the visits of each expert since it came in, at least 1."""
    return usage.visits_X.__array_namespace__().clip(usage.visits_X, 1.0, None)


def _priority_or(rest_X: Any, outlook: Outlook, layer: Any, distance: int) -> Any:
    """Returns the prefetch priority of each expert that the forecast wants soon, and ``rest_X`` of the
    others."""
    xp, until_L1, soon_L1 = _layers_ahead(outlook, layer, distance)
    priority_LE = outlook.p_LE / xp.clip(until_L1, 1, None).astype(xp.float32)
    wanted_X = (outlook.wanted_LE & soon_L1 & (priority_LE > 0)).reshape(-1)
    return xp.where(wanted_X, priority_LE.reshape(-1), rest_X)


def best_prefetches(
    worth_X: Any, outlook: Outlook, layer: Any, present_X: Any, *, distance: int, count: int
) -> tuple[Any, Any]:
    """Returns the ``count`` experts of the next ``distance`` layers that are most worth fetching (X for
    none), and their worth."""
    xp = worth_X.__array_namespace__()
    x, experts = worth_X.shape[0], outlook.p_LE.shape[1]
    row_A1 = (layer + 1 + xp.arange(distance, dtype=xp.int32))[:, None]
    flat_W = (row_A1 * experts + xp.arange(experts, dtype=xp.int32)[None]).reshape(-1)
    within_W = flat_W < x
    flat_W = xp.where(within_W, flat_W, 0)
    may_W = within_W & outlook.wanted_LE.reshape(-1)[flat_W] & ~present_X[flat_W] & (worth_X[flat_W] > 0)
    gain_W = xp.where(may_W, worth_X[flat_W], xp.asarray(-xp.inf, dtype=worth_X.dtype))
    best_M = xp.argsort(-gain_W, stable=True)[:count]
    return xp.where(may_W[best_M], flat_W[best_M], x).astype(xp.int32), gain_W[best_M]


def misses(needed_E: Any, present_E: Any, first_id: Any, max_experts: int, no_id: int) -> tuple[Any, Any]:
    """Returns the flat ids of a layer's experts that are needed and not present, padded at the end with
    ``no_id``, and their gain.

    first_id: flat id of the layer's first expert.
    """
    xp = needed_E.__array_namespace__()
    missing_E = needed_E & ~present_E
    first_M = xp.argsort(~missing_E, stable=True)[:max_experts].astype(xp.int32)
    experts_M = xp.where(missing_E[first_M], first_id + first_M, no_id).astype(xp.int32)
    return experts_M, xp.full(experts_M.shape[0], NEEDED, dtype=xp.float32)
