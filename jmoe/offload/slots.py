"""The slots of the device's pool: which of the experts of all layers lie there, and where.

A pure state machine over small arrays, in the array namespace of its arguments: numpy's on the host, jax's
inside a jitted step. A slot is empty, holds an expert, or is in flight: claimed, but its copy has not arrived
yet. An expert can run only if it is held and not in flight. A slot that is pinned or in flight is never
taken. Weights are read-only: an evicted expert is dropped, nothing is written back to the host.

    empty --claim--> in flight --land--> held --claim (evicts)--> in flight
"""

from typing import Any, NamedTuple

NEEDED = float("inf")  # the gain of an expert that must have a slot if any may be taken


class Slots(NamedTuple):
    """The slots of a pool.

    held_S: flat id of the expert in each slot, X if the slot is empty.
    slot_X: slot of each expert, S if it has none.
    pinned_S: whether the slot is pinned and must not be taken.
    flying_S: whether the slot is in flight: it has no weights yet.
    """

    held_S: Any
    slot_X: Any
    pinned_S: Any
    flying_S: Any


def empty(slots: int, experts: int, xp: Any) -> Slots:
    """Makes ``slots`` empty slots for ``experts`` experts, as arrays of the namespace ``xp``."""
    held_S = xp.full(slots, experts, dtype=xp.int32)
    slot_X = xp.full(experts, slots, dtype=xp.int32)
    return Slots(held_S, slot_X, xp.zeros(slots, dtype=bool), xp.zeros(slots, dtype=bool))


def present(slots: Slots) -> Any:
    """Returns whether each expert has a slot, in flight or not: ``[X]``."""
    return slots.slot_X < slots.held_S.shape[0]


def resident(slots: Slots) -> Any:
    """Returns whether each expert can run: ``[X]``."""
    return ~_append(slots.flying_S, True)[slots.slot_X]


def pin(slots: Slots, experts_X: Any) -> Slots:
    """Pins the slots of the experts marked, and no others."""
    return slots._replace(pinned_S=_append(experts_X, False)[slots.held_S])


def claim(slots: Slots, experts_M: Any, gain_M: Any, worth_X: Any) -> tuple[Slots, Any]:
    """Claims slots for experts that have none; returns the slots and the slot of each, S for those without.

    experts_M: flat ids, the most needed first; X means none and comes last.
    gain_M: worth of each of them, in descending order. An expert takes only the slot of one that is worth
        less; if its gain is ``NEEDED``, it takes any slot that may be taken.
    worth_X: worth of every expert, any numbers. NaN is worth least; no expert is worth less than an empty
        slot, or so much that ``NEEDED`` could not take its slot. Of equals the lower slot goes first.
    """
    xp = slots.held_S.__array_namespace__()
    (s,), (x,), (m,) = slots.held_S.shape, slots.slot_X.shape, experts_M.shape
    # Ascending: empty slots at -inf, held ones at finite worths, slots that must not be taken at inf.
    worth_S = _append(_finite(worth_X), -xp.inf)[slots.held_S]
    worth_S = xp.where(slots.pinned_S | slots.flying_S, xp.asarray(xp.inf, dtype=worth_S.dtype), worth_S)
    cheapest_S = xp.argsort(worth_S, stable=True).astype(xp.int32)
    cheapest_M, worth_M = _padded(cheapest_S, m, s), _padded(worth_S[cheapest_S], m, xp.inf)
    takes_M = (experts_M < x) & (worth_M < _normal(gain_M))
    takes_M = xp.cumsum(~takes_M) == 0  # the experts that take a slot are the first of M, for any gains
    slot_M = xp.where(takes_M, cheapest_M, s).astype(xp.int32)

    new_MS = slot_M[:, None] == xp.arange(s, dtype=xp.int32)[None]
    new_S = xp.any(new_MS, axis=0)
    incoming_S = xp.max(xp.where(new_MS, experts_M[:, None], -1), axis=0)
    held_S = xp.where(new_S, incoming_S, slots.held_S).astype(xp.int32)
    gone_X = _append(new_S, False)[slots.slot_X]
    comes_MX = takes_M[:, None] & (experts_M[:, None] == xp.arange(x, dtype=xp.int32)[None])
    slot_X = xp.where(gone_X, s, slots.slot_X)
    slot_X = xp.where(
        xp.any(comes_MX, axis=0), xp.max(xp.where(comes_MX, slot_M[:, None], -1), axis=0), slot_X
    )
    return Slots(held_S, slot_X.astype(xp.int32), slots.pinned_S, slots.flying_S | new_S), slot_M


def land(slots: Slots) -> Slots:
    """Returns the slots after every copy has arrived."""
    return slots._replace(flying_S=slots.flying_S & False)


def _finite(worth_X: Any) -> Any:
    """Returns finite numbers in the same order, so that the sort and the comparisons after it are total."""
    xp = worth_X.__array_namespace__()
    most = xp.finfo(worth_X.dtype).max
    return xp.clip(xp.where(xp.isnan(worth_X), -most, _normal(worth_X)), -most, most)


def _normal(values_N: Any) -> Any:
    """Returns the values with 0 for denormal numbers, which some hardware compares as 0 and other does
    not."""
    xp = values_N.__array_namespace__()
    least = xp.finfo(values_N.dtype).tiny
    return xp.where(xp.abs(values_N) < least, xp.zeros((), dtype=values_N.dtype), values_N)


def _append(values_N: Any, last_value: Any) -> Any:
    """Returns the values and one more, for the index that means none."""
    xp = values_N.__array_namespace__()
    return xp.concat([values_N, xp.full(1, last_value, dtype=values_N.dtype)])


def _padded(values_S: Any, count: int, value: Any) -> Any:
    """Returns the first ``count`` values, padded with ``value``."""
    xp = values_S.__array_namespace__()
    short = max(0, count - values_S.shape[0])
    return xp.concat([values_S[:count], xp.full(short, value, dtype=values_S.dtype)])
