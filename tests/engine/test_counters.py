"""A counter of the MoE layers is one declaration, and is reported everywhere under its name."""

import subprocess
import sys

import jax.numpy as jnp
import pytest
from prometheus_client.core import Metric
from support.server.fake_engine import FakeEngine

from jmoe.config.counters import ASSIGNMENTS, COUNTERS, MEANS, Counter, names
from jmoe.engine.reports import EngineSnapshot
from jmoe.engine.step.counters import FIRST, MoECounters, add_step, zero_totals
from jmoe.moe.counting import add_changes
from jmoe.moe.types import DispatchStats, Traffic
from jmoe.server.watch.metrics import EngineCollector
from jmoe.server.watch.snapshots import take_snapshot, window_report
from jmoe.server.watch.totals import Totals

UNITS = {"one": 1, "row": 10, "expert": 1000}
AMOUNTS = {counter.name: 3 + i for i, counter in enumerate(COUNTERS)}
DECLARED = {counter.name: AMOUNTS[counter.name] * UNITS[counter.unit] for counter in COUNTERS}
SHAPE = {"layers": 1, "moe_layers": [0], "experts": 2, "top_k": 1}


def layer(assignments: int) -> DispatchStats:
    """Returns a layer that counted every amount."""
    counts_E = jnp.asarray([assignments, 0], jnp.int32)
    amounts = {name: jnp.int32(amount) for name, amount in AMOUNTS.items() if name != ASSIGNMENTS.name}
    sent, useful, lost = (amounts.pop(name) for name in ("transport_bytes", "transport_useful_bytes",
                                                             "lost_assignments"))  # fmt: skip
    traffic = Traffic(useful, sent, counts_E.sum(dtype=jnp.int32) - lost)
    return DispatchStats(counts_E, counts_E, jnp.zeros(2), traffic, amounts)


def counted(assignments: int) -> MoECounters:
    counters = MoECounters(1, 2, UNITS["row"], UNITS["expert"])
    counters.drain(add_step(zero_totals(1, 2), [layer(assignments)]))
    return counters


class CountedEngine(FakeEngine):
    """One layer on two ranks that counted every amount in prefill and nothing in decode."""

    def moe_stats(self):
        def phase(counters: MoECounters) -> dict:
            return counters.report() | {"counts": counters.counts_LE.tolist()}

        busy, idle = counted(AMOUNTS["assignments"]), MoECounters(1, 2, UNITS["row"], UNITS["expert"])
        mesh = {"data": 1, "expert": 2, "tensor": 1}
        return {"model": SHAPE, "mesh": mesh, "prefill": phase(busy), "decode": phase(idle)}


@pytest.fixture(scope="module")
def metrics() -> dict[str, Metric]:
    return {metric.name: metric for metric in EngineCollector(CountedEngine()).collect()}


def test_names_and_metrics_are_unique():
    exported = [counter.metric for counter in COUNTERS if counter.metric]
    assert len(set(names(COUNTERS))) == len(COUNTERS) and len(set(exported)) == len(exported)


def test_a_layers_row_has_every_counter_in_its_unit():
    (row,) = counted(AMOUNTS["assignments"]).report()["per_layer"]
    assert {name: row[name] for name in DECLARED} == DECLARED
    assert list(row)[: len(FIRST)] == list(FIRST) and set(row) == {*DECLARED, *MEANS}


def test_a_step_of_padding_counts_only_what_padding_cannot():
    (row,) = counted(0).report()["per_layer"]
    counted_ones = {counter.name for counter in COUNTERS if row[counter.name]}
    assert counted_ones == {c.name for c in COUNTERS if not c.is_padded and c is not ASSIGNMENTS}


@pytest.mark.parametrize("counter", COUNTERS, ids=lambda counter: counter.name)
def test_metrics_have_every_counter_that_has_one(counter: Counter, metrics: dict[str, Metric]):
    if counter.metric is None:
        assert counter.name not in "".join(metrics)
        return
    metric = metrics[counter.metric]
    assert metric.documentation == counter.text
    assert [sample.value for sample in metric.samples] == [DECLARED[counter.name]]


def test_a_window_has_every_counter():
    before = take_snapshot(EngineSnapshot(0, 0, 0.0, True, 0), idle_stats(), Totals())
    after = take_snapshot(EngineSnapshot(0, 0, 0.0, True, 0), CountedEngine().moe_stats(), Totals())
    moe = window_report(before, after, "all")["moe"]
    assert {name: moe[name] for name in DECLARED} == DECLARED
    assert {name: moe["per_layer"][0][name] for name in DECLARED} == DECLARED


def idle_stats() -> dict:
    stats = CountedEngine().moe_stats()
    return stats | {"prefill": stats["decode"]}


def test_what_was_not_declared_is_refused():
    stats = layer(1)
    stats.counts["split"] = jnp.int32(1)
    with pytest.raises(KeyError, match="split"):
        add_step(zero_totals(1, 2), [stats])


def test_two_stages_may_count_by_one_name():
    one = {"dropped": jnp.array([1, 2])}
    both = add_changes(one, {"dropped": jnp.array([3, 0]), "remapped": jnp.array([1, 1])})
    assert {name: n_T.tolist() for name, n_T in both.items()} == {"dropped": [4, 2], "remapped": [1, 1]}


NEW = """
import jmoe.config.counters as table

new = table.Counter("split", "Those in two", "jmoe_moe_split_assignments")
table.LOSSY += (new,)
table.USAGE += (new,)
table.COUNTERS += (new,)

from dataclasses import asdict
from types import SimpleNamespace

import jax.numpy as jnp
import msgspec
import numpy as np

from jmoe.engine.request import MoEUsage
from jmoe.engine.step.counters import MoECounters, add_step, zero_totals
from jmoe.engine.step.results import count_assignments
from jmoe.moe.counting import count_changes
from jmoe.moe.types import DispatchStats, Traffic
from jmoe.server.answer.replies import MoEUse
from jmoe.server.watch.metrics import MOE_COUNTERS
from jmoe.server.watch.snapshots import SUMS
from jmoe.tools.bench.measures import lossy_counts

one, two_E = jnp.int32(1), jnp.full(2, 1, jnp.int32)
counted = DispatchStats(two_E, two_E, jnp.zeros(2), Traffic(one, one, one), {"split": jnp.int32(7)})
counters = MoECounters(1, 2, 1, 1)
counters.drain(add_step(zero_totals(1, 2), [counted]))
assert counters.report()["split"] == counters.report()["per_layer"][0]["split"] == 7

changes = count_changes({"remapped": jnp.ones(2, jnp.int32)})
assert changes["split"].tolist() == [0, 0]
request = SimpleNamespace(moe=MoEUsage())
placed = SimpleNamespace(run=SimpleNamespace(count=1, request=request), change_rows=[1])
cfg = SimpleNamespace(moe_layers=[0], num_experts_per_tok=2)
count_assignments(placed, {"split": np.array([3, 4])}, cfg)
assert request.moe.split == 4 and msgspec.convert(asdict(request.moe), MoEUse).split == 4
assert lossy_counts([SimpleNamespace(moe=asdict(request.moe))])["split_share"] == 2
assert "split" in SUMS and ("jmoe_moe_split_assignments", "Those in two", "split") in MOE_COUNTERS
"""


def test_a_new_counter_is_its_declaration_and_the_line_that_counts_it():
    done = subprocess.run([sys.executable, "-c", NEW], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
