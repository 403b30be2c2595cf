"""A fake engine whose experts' counts grow with each look at them, as the dashboard's tests need it."""

import numpy as np
from support.server.fake_engine import FakeEngine

from jmoe.engine.reports import StepReport
from jmoe.server.watch.snapshots import MEANS, SUMS

LAYERS, EXPERTS, RANKS = 3, 8, 4


class CountingEngine(FakeEngine):
    """Its experts' counts grow with each look, which it counts; each token is a step that it reports."""

    looks = 0

    def moe_stats(self):
        self.looks += 1
        return made_up(np.random.default_rng(1), self.looks)

    def _step(self, request):
        super()._step(request)
        for listener in self.listeners:
            listener.stepped(StepReport(3, 1, 0.004, 0.001))


def made_up(rng, times: int) -> dict:
    """Returns the statistics of an engine that did the same ``times`` times."""

    def phase(steps: int) -> dict:
        counts = rng.integers(0, 50, (LAYERS, EXPERTS))
        layers = [
            {name: float(rng.uniform(1, 8)) for name in MEANS}
            | {name: int(rng.integers(1, 1000)) * times for name in SUMS}
            | {"assignments": int(row.sum()) * times}
            for row in counts
        ]
        return {"steps": steps * times, "per_layer": layers, "counts": (counts * times).tolist()}

    model = {"layers": 4, "moe_layers": [1, 2, 3], "experts": EXPERTS, "top_k": 2}
    mesh = {"data": 1, "expert": RANKS, "tensor": 1}
    return {"model": model, "mesh": mesh, "prefill": phase(2), "decode": phase(5)}
