"""Tests the slot table against plain objects, in every state that it can reach, and without jax."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.offload import slots as under_test
from jmoe.offload.slots import Slots

ROOT = Path(__file__).parents[2]


def test_the_slot_table_needs_no_jax():
    """The scheduler of a host-driven step, or a simulator, decides without an accelerator's runtime."""
    code = "import sys, jmoe.offload.slots; sys.exit('jax' in sys.modules)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


@dataclass(frozen=True)
class Slot:
    expert: int | None = None
    pinned: bool = False
    flying: bool = False


Machine = tuple[Slot, ...]


def pin(machine: Machine, marked: set[int]) -> Machine:
    return tuple(Slot(slot.expert, slot.expert in marked, slot.flying) for slot in machine)


def land(machine: Machine) -> Machine:
    return tuple(Slot(slot.expert, slot.pinned) for slot in machine)


def claim(
    machine: Machine, asked: list[tuple[int, float]], worth: list[float]
) -> tuple[Machine, dict[int, int]]:
    """Gives the slots worth least, empty ones first, to the experts in turn, while these are worth more.

    A slot that was just taken is in flight, so that it is not taken twice.
    """
    given = {}
    for expert, gain in asked:
        free = [i for i, slot in enumerate(machine) if not (slot.pinned or slot.flying)]

        def cost(i: int, machine: Machine = machine) -> tuple[float, int]:
            held = machine[i].expert
            return (-np.inf if held is None else worth[held], i)

        if not free or cost(best := min(free, key=cost))[0] >= gain:
            break
        given[expert] = best
        machine = tuple(Slot(expert, flying=True) if i == best else slot for i, slot in enumerate(machine))
    return machine, given


def as_arrays(machine: Machine, experts: int) -> Slots:
    held_S = np.array([experts if s.expert is None else s.expert for s in machine], np.int32)
    slot_X = np.full(experts, len(machine), np.int32)
    for i, slot in enumerate(machine):
        if slot.expert is not None:
            slot_X[slot.expert] = i
    return Slots(held_S, slot_X, np.array([s.pinned for s in machine]), np.array([s.flying for s in machine]))


def same(found: Slots, machine: Machine, experts: int) -> None:
    """Asserts equality, and that each expert's slot holds it and no other does.

    ``slot_X`` is made from that here.
    """
    for name, got, want in zip(Slots._fields, found, as_arrays(machine, experts), strict=True):
        assert got.dtype == want.dtype and (got == want).all(), (name, machine)


def asks(absent: list[int]) -> Iterator[tuple[int, ...]]:
    return itertools.chain.from_iterable(itertools.permutations(absent, n) for n in (1, 2))


def reachable(slots: int, experts: int, events) -> set[Machine]:
    """Returns every state after any number of events.

    events: function of a machine that gives the states after one event.
    """
    found, edge = set(), {tuple([Slot()] * slots)}
    while edge:
        found |= edge
        edge = {after for machine in edge for after in events(machine)} - found
    return found


@pytest.mark.parametrize(
    ("slots", "experts"), [(1, 2), (2, 3), *(pytest.param(n, 4, marks=pytest.mark.matrix) for n in (2, 3))]
)
def test_every_reachable_state_and_event_is_that_of_the_machine(slots: int, experts: int):
    """Events are claims of one or two experts in either order, pins of any set, and landing.

    The worth of claimed experts lies anywhere among that of all others.
    """
    ranks = [list(map(float, order)) for order in itertools.permutations(range(experts))]
    claims = 0

    def events(machine: Machine) -> Iterator[Machine]:
        nonlocal claims
        before = as_arrays(machine, experts)
        same(under_test.land(before), land(machine), experts)
        yield land(machine)
        for marked_X in itertools.product((False, True), repeat=experts):
            after = pin(machine, {e for e in range(experts) if marked_X[e]})
            same(under_test.pin(before, np.array(marked_X)), after, experts)
            yield after
        held = {slot.expert for slot in machine}
        absent = [e for e in range(experts) if e not in held]
        present_X = [e in held for e in range(experts)]
        resident_X = [any(s.expert == e and not s.flying for s in machine) for e in range(experts)]
        assert under_test.present(before).tolist() == present_X
        assert under_test.resident(before).tolist() == resident_X
        for wanted in asks(absent):
            # Worth decides by order alone, and only among slots that may be taken: one of each ranking.
            free = [s.expert for s in machine if s.expert is not None and not (s.pinned or s.flying)]
            worths = {tuple(rank[e] for e in free): rank for rank in ranks}.values()
            ties = [[0.0] * experts]
            for worth in (*worths, *ties):
                for gains in _falling(len(wanted), sorted(set(worth))):
                    claims += 1
                    yield check_claim(machine, before, wanted, gains, worth, experts)

    states = reachable(slots, experts, events)
    assert claims > len(states) and all(len(machine) == slots for machine in states)
    assert {len({s.expert for s in m} - {None}) for m in states} == set(range(min(slots, experts) + 1))


def _falling(count: int, worth: list[float]) -> list[tuple[float, ...]]:
    """Returns falling gains of ``count`` experts.

    They lie between the worths of the experts in slots, at them, and beyond.
    """
    levels = sorted({w + d for w in (worth[0], worth[-1], worth[len(worth) // 2]) for d in (-0.5, 0.0, 0.5)})
    return [g for g in itertools.product(levels, repeat=count) if list(g) == sorted(g, reverse=True)]


def check_claim(
    machine: Machine, before: Slots, wanted: tuple[int, ...], gains: tuple[float, ...], worth: list[float],
    experts: int,
) -> Machine:  # fmt: skip
    slots = len(machine)
    after, given = claim(machine, list(zip(wanted, gains, strict=True)), worth)
    experts_M = np.array([*wanted, experts], np.int32)  # and an id that is no expert
    gain_M = np.array([*gains, gains[-1]], np.float32)
    found, slot_M = under_test.claim(before, experts_M, gain_M, np.array(worth, np.float32))
    same(found, after, experts)
    assert slot_M.tolist() == [*(given.get(e, slots) for e in wanted), slots], (machine, wanted, gains, worth)
    # This is less plain in the machine's own loop.
    assert list(given) == list(wanted)[: len(given)], "those that get a slot are the first in need"
    for expert, slot in given.items():
        taken = machine[slot]
        assert not (taken.pinned or taken.flying), "what is used or on its way stays"
        assert found.held_S[slot] == expert and found.flying_S[slot]
        if taken.expert is None:
            continue
        assert found.slot_X[taken.expert] == slots, "what is evicted is forgotten"
        assert worth[taken.expert] < gains[wanted.index(expert)], "nothing gives way to what is worth less"
        assert all(s.expert is not None for s in after), "empty slots first"
    return after


def test_jax_decides_as_numpy_does_under_jit():
    """Promotion is strict in the tests: the same program runs in the step."""
    rng, slots, experts, most = np.random.default_rng(0), 5, 12, 4
    step = jax.jit(under_test.claim)
    state = under_test.empty(slots, experts, np)
    on_device = under_test.empty(slots, experts, jnp)
    for _ in range(60):
        absent = np.flatnonzero(~under_test.present(state))
        some = rng.permutation(absent)[: rng.integers(0, most + 1)]
        experts_M = np.full(most, experts, np.int32)
        experts_M[: len(some)] = some
        gain_M = -np.sort(-rng.integers(0, 6, most)).astype(np.float32)
        worth_X = rng.integers(0, 6, experts).astype(np.float32)
        state, slot_M = under_test.claim(state, experts_M, gain_M, worth_X)
        on_device, found_M = step(on_device, *map(jnp.asarray, (experts_M, gain_M, worth_X)))
        pinned_X = rng.random(experts) < 0.2
        if rng.random() < 0.5:
            state, on_device = under_test.land(state), under_test.land(on_device)
        state = under_test.pin(state, pinned_X)
        on_device = jax.jit(under_test.pin)(on_device, jnp.asarray(pinned_X))
        for got, want in zip((*on_device, found_M), (*state, slot_M), strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)


ODD = np.array(
    [
        np.nan,
        np.inf,
        -np.inf,
        0.0,
        -0.0,
        1e-42,
        -1e-42,
        1.0,
        -1.0,
        *(s * np.finfo(np.float32).max for s in (1, -1)),
    ],
    np.float32,
)


def cost(worth: float) -> float:
    most = float(np.finfo(np.float32).max)
    if np.isnan(worth):
        return -most
    return 0.0 if abs(worth) < np.finfo(np.float32).tiny else min(max(worth, -most), most)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_whatever_experts_are_worth_what_is_needed_has_a_slot(xp):
    """The order is total for any worth and any gain, NaN too.

    Nothing that is needed goes without a slot as long as one may be taken.
    """
    rng, slots, experts, most = np.random.default_rng(1), 6, 10, 4
    step = jax.jit(under_test.claim) if xp is jnp else under_test.claim
    for _ in range(300):
        held_S = np.where(rng.random(slots) < 0.8, rng.permutation(experts)[:slots], experts).astype(np.int32)
        machine = tuple(
            Slot(None if e == experts else int(e), *(bool(b) for b in (rng.random(2) < 0.25) & (e < experts)))
            for e in held_S
        )
        before = as_arrays(machine, experts)
        absent = rng.permutation(np.setdiff1d(np.arange(experts), held_S))[: rng.integers(0, most + 1)]
        experts_M = np.append(absent, np.full(most - len(absent), experts)).astype(np.int32)
        worth_X, needed = rng.choice(ODD, experts), rng.random() < 0.5
        gain_M = np.full(most, under_test.NEEDED, np.float32) if needed else rng.choice(ODD, most)
        given = map(xp.asarray, (experts_M, gain_M, worth_X))
        after, slot_M = jax.tree.map(np.asarray, step(Slots(*map(xp.asarray, before)), *given))
        free = [i for i, slot in enumerate(machine) if not (slot.pinned or slot.flying)]
        in_order = sorted(
            free, key=lambda i: (held_S[i] < experts, cost(float(worth_X[held_S[i] % experts])), i)
        )
        took = [int(slot) for slot in slot_M if slot < slots]
        assert took == in_order[: len(took)] and slot_M[len(took) :].tolist() == [slots] * (most - len(took))
        if needed:
            assert len(took) == min(len(absent), len(free))
        assert after.held_S[took].tolist() == absent[: len(took)].tolist() and after.flying_S[took].all()
        for slot, expert in enumerate(after.held_S):
            assert expert == experts or after.slot_X[expert] == slot
        assert np.sum(after.slot_X < slots) == np.sum(after.held_S < experts)
