"""Simulates the expert cache over traces: every comparator at every budget and batch.

A comparator is a predictor and an eviction. "fMoE" is the paper's pair with a store that is filled from the
profile before the run; "online" also learns during the run. LRU, LFU and request counts (MoE-Infinity's) are
the baselines of the target. "next gate" alone has no profile; the default also uses the token table before
the first layer.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from shared.oracle import Oracle, belady
from studies.offload.simulator import Link, Trace, begin, next_uses, run
from studies.offload.traces import AHEAD

from jmoe.config.model import ModelConfig
from jmoe.offload.policy import RULES
from jmoe.offload.predictors.base import PredictorInputs, PredictorSizes
from jmoe.offload.predictors.make import make_predictor
from jmoe.offload.predictors.next_gate import NextGate
from jmoe.offload.slot_table import CacheSettings, fill, new_table
from jmoe.offload.types import Predictor
from jmoe.placement.profile import Profile

# the name of each comparator: its predictor and its eviction
COMPARATORS = {
    "LRU": ("none", "lru"),
    "LFU": ("none", "lfu"),
    "request counts, LRU": ("counts", "lru"),
    "request counts, LFU": ("counts", "lfu"),
    "fMoE": ("expert_map", "expert_map"),
    "fMoE, online": ("expert_map online", "expert_map"),
    "next gate, LRU": ("next_gate alone", "lru"),
    "token table, LRU": ("token_table", "lru"),
    "no prefetch": ("none", "expected_use"),
    "request counts": ("counts", "expected_use"),
    "expert maps": ("expert_map", "expected_use"),
    "expert maps, online": ("expert_map online", "expected_use"),
    "token table": ("token_table", "expected_use"),
    "next gate": ("next_gate alone", "expected_use"),
    "default": ("next_gate", "expected_use"),
    "oracle": ("oracle", "belady"),
}
VARIED = ("LRU", "request counts, LRU", "fMoE", "expert maps, online", "token table", "next gate", "oracle")
BASELINES = ("LRU", "LFU", "request counts, LRU", "request counts, LFU")
EVICTIONS = {**RULES, "belady": belady}
STATED = Link(copy_time=1.0, prompt_time=4.0)  # one expert's copy = one decode layer's compute


class Setting(NamedTuple):
    """A setting of the simulated cache.

    slots: number of slots of the pool.
    max_prefetches: number of prefetches that one layer may begin.
    distance: number of layers to look ahead.
    store: number of iterations that expert maps keep.
    link: link from the host to the device.
    """

    slots: int
    max_prefetches: int = 1
    distance: int = AHEAD
    store: int = 1000
    link: Link = STATED


class Subject(NamedTuple):
    """The model of a simulation, and its data.

    cfg: shape of the model.
    embeddings_VD: model's embeddings.
    profile: profile of the model.
    traces: traces of the model.
    """

    cfg: ModelConfig
    embeddings_VD: np.ndarray
    profile: Profile
    traces: list[Trace]


def simulate(subject: Subject, name: str, setting: Setting) -> dict[str, float]:
    """Runs one comparator over all traces, one after another. Returns its figures.

    The cache begins full of the experts that the profile saw most often.
    """
    cfg, traces = subject.cfg, subject.traces
    layers, experts = cfg.num_hidden_layers, cfg.num_experts
    predictor_name, eviction = COMPARATORS[name]
    predictor = _predictor(subject, predictor_name, setting)
    oracle = predictor_name == "oracle"
    known_NLE = np.concatenate([t.needs_NLE for t in traces]) if oracle else None
    due_NLE = None if known_NLE is None else next_uses(known_NLE)
    often_LE = subject.profile.loads_LE.astype(np.float32)
    state = begin(fill(new_table(setting.slots, layers, experts, np), often_LE)[0], predictor)
    settings = CacheSettings(EVICTIONS[eviction], setting.max_prefetches, setting.distance)
    found, step = [], 0
    for trace in traces:
        n = len(trace.tokens_NB)
        known = None
        if known_NLE is not None and due_NLE is not None:
            known = known_NLE[step : step + n], due_NLE[step : step + n]
        trace = trace._replace(next_scores_NLBAE=trace.next_scores_NLBAE[:, :, :, : setting.distance])
        state, prompt, figures = run(state, trace, known, settings, setting.link)
        found.append((prompt, jax.tree.map(jnp.sum, figures)))
        step += n
    prompts, sums = jax.tree.map(lambda *each: float(sum(map(float, each))), *found)
    return {
        "hit": sums.hits / sums.needed,
        "late": sums.late / sums.needed,
        "needed": sums.needed / step,
        "copies": (sums.misses + sums.prefetched) / step,
        "prefetched": sums.prefetched / step,
        "useful": sums.useful / max(sums.prefetched, 1),
        "tpot": sums.time / step,
        "ttft": prompts.time / len(traces),
        "prompt_hit": prompts.hits / prompts.needed,
    }


def _predictor(subject: Subject, name: str, setting: Setting) -> Predictor:
    cfg = subject.cfg
    layers, experts, k = cfg.num_hidden_layers, cfg.num_experts, cfg.num_experts_per_tok
    if name == "oracle":
        return Oracle(jnp.zeros((layers, experts), bool), setting.distance)
    if name == "next_gate alone":
        return NextGate(None, setting.distance, experts, k)
    base, _, online = name.partition(" ")
    seats = subject.traces[0].tokens_NB.shape[1]
    sizes = PredictorSizes(setting.distance, k, layers, experts, seats, setting.store)
    inputs = PredictorInputs(subject.profile, subject.embeddings_VD, True if online else None)
    return make_predictor(base, sizes, inputs)  # pyright: ignore[reportArgumentType]


def sweep(
    subject: Subject,
    traces_by_batch: dict[int, list[Trace]],
    shares: tuple[float, ...],
    names: tuple[str, ...],
) -> dict[str, Any]:
    """Returns the figures by batch/share of experts and comparator."""
    every = subject.cfg.num_hidden_layers * subject.cfg.num_experts
    found: dict[str, Any] = {}
    for batch, traces in traces_by_batch.items():
        mine = subject._replace(traces=traces)
        for share in shares:
            start = time.perf_counter()
            setting = Setting(slots=max(round(every * share), subject.cfg.num_experts_per_tok))
            found[f"{batch}/{share:g}"] = {name: rounded(simulate(mine, name, setting)) for name in names}
            jax.clear_caches()  # every run compiles a scan; a process may map only so many
            print(f"batch {batch}, {share:.0%}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}
