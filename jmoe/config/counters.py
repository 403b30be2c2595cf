"""The counters of the MoE layers; each one is declared here once. This module imports nothing heavy, because
the server needs it too.

A layer counts by these names (``jmoe.moe.types.DispatchStats``). The sums over steps, /moe/stats, the
dashboard's windows, /metrics, the usage of requests and the benchmarks' reports follow from these tables.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Counter:
    """A sum over tokens or experts, by layer.

    name: key of the counter wherever it is counted or reported.
    text: what it counts, as /metrics explains it.
    metric: its name in /metrics; None if it is not exported.
    unit: what a count of one is reported as: one, or the bytes of a row between ranks, or of an expert.
    is_padded: whether padding is counted too; then a step without a valid token, as in warm-up, is left out.
    """

    name: str
    text: str
    metric: str | None
    unit: Literal["one", "row", "expert"] = "one"
    is_padded: bool = False


def cached(name: str, text: str, metric: str | None, unit: Literal["one", "expert"] = "one") -> Counter:
    """Returns a counter of an expert cache, which acts before it knows a step's tokens."""
    return Counter(name, text, metric, unit, is_padded=True)


# The sum of the assignments of all experts, which are counted by expert.
ASSIGNMENTS = Counter("assignments", "Tokens sent to experts", "jmoe_moe_assignments")
# These are also counted by token, so that each request's usage can report them.
LOSSY = (
    Counter("remapped", "Those that binning gave to another expert", "jmoe_moe_remapped_assignments"),
    Counter("dropped", "Those that no expert computed", "jmoe_moe_dropped_assignments"),
    Counter("rerouted", "Those to another expert than chosen, for room", "jmoe_moe_rerouted_assignments"),
)
ROUTED = (
    Counter(
        "lost_assignments",
        "Those not computed though none dropped them: must be 0",
        "jmoe_moe_lost_assignments",
    ),
    Counter("remote_assignments", "Those to another rank's experts", "jmoe_moe_remote_assignments"),
    Counter(
        "transport_bytes",
        "Between ranks, both ways, padding included",
        "jmoe_moe_transport_bytes",
        "row",
        is_padded=True,
    ),
    Counter(
        "transport_useful_bytes", "Those that the routing needed", "jmoe_moe_transport_useful_bytes", "row"
    ),
)
# An expert counts once per step for any number of tokens; on a mesh these are sums over the ranks' caches.
CACHE = (
    cached("expert_cache_hits", "Experts needed that were on the device", "jmoe_moe_expert_cache_hits"),
    cached("expert_cache_misses", "Those that were in host memory", "jmoe_moe_expert_cache_misses"),
    cached("expert_cache_evictions", "Experts that gave way to others", "jmoe_moe_expert_cache_evictions"),
    cached("bytes_host_to_device", "Experts copied, for whatever reason", None, "expert"),
    cached("prefetch_bytes", "Experts copied before they were needed", "jmoe_moe_prefetch_bytes", "expert"),
    cached(
        "prefetch_useful_bytes", "Those of them that were used", "jmoe_moe_prefetch_useful_bytes", "expert"
    ),
)
USAGE = (ASSIGNMENTS, *LOSSY)
COUNTERS = (*USAGE, *ROUTED, *CACHE)
MEANS = ("active_experts", "active_experts_baseline", "max_over_mean_load")  # means over steps, not sums


def names(counters: Iterable[Counter]) -> tuple[str, ...]:
    return tuple(counter.name for counter in counters)
