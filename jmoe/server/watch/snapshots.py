"""Snapshots of the server's counts, and reports of what happened between two of them."""

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jmoe.config.counters import COUNTERS, MEANS, names
from jmoe.config.techniques import Phase
from jmoe.engine.reports import EngineSnapshot
from jmoe.server.watch.totals import TimeHistogram, Totals, percentile

ReportPhase = Literal["all", Phase]
SUMS = names(COUNTERS)


@dataclass(frozen=True)
class PhaseCounts:
    """Counts of one phase since the start.

    steps: number of steps.
    counts_LE: assignments of each expert, by layer.
    sums_LS: counters of each layer, in the order of ``SUMS``.
    means_LM: per-step values of each layer, in the order of ``MEANS``, summed over the steps.
    """

    steps: int
    counts_LE: np.ndarray
    sums_LS: np.ndarray
    means_LM: np.ndarray

    @classmethod
    def from_stats(cls, stats: dict[str, Any]) -> "PhaseCounts":
        steps, layers = stats["steps"], stats["per_layer"]
        sums = np.array([[layer[key] for key in SUMS] for layer in layers], np.int64)
        means = np.array([[layer[key] for key in MEANS] for layer in layers], np.float64)
        return cls(steps, np.asarray(stats["counts"], np.int64), sums, means * steps)

    def plus(self, other: "PhaseCounts", sign: int = 1) -> "PhaseCounts":
        return PhaseCounts(
            self.steps + sign * other.steps,
            self.counts_LE + sign * other.counts_LE,
            self.sums_LS + sign * other.sums_LS,
            self.means_LM + sign * other.means_LM,
        )


@dataclass(frozen=True)
class Snapshot:
    """The state of the server at one moment.

    time: time of the snapshot in monotonic seconds.
    totals: counts of the delivered tokens and of the steps.
    snapshot: state of the engine.
    model: sizes of the model, the same in every snapshot.
    mesh: sizes of the mesh axes, the same in every snapshot.
    rank_LE: rank of each expert, the same in every snapshot.
    phases: expert counts by phase.
    """

    time: float
    totals: Totals
    snapshot: EngineSnapshot
    model: dict[str, Any]
    mesh: dict[str, int]
    rank_LE: np.ndarray
    phases: dict[ReportPhase, PhaseCounts]


def take_snapshot(snapshot: EngineSnapshot, stats: dict[str, Any], totals: Totals) -> Snapshot:
    prefill, decode = PhaseCounts.from_stats(stats["prefill"]), PhaseCounts.from_stats(stats["decode"])
    phases: dict[ReportPhase, PhaseCounts] = {
        "all": prefill.plus(decode),
        "prefill": prefill,
        "decode": decode,
    }
    model, mesh = stats["model"], stats["mesh"]
    return Snapshot(time.monotonic(), totals.copy(), snapshot, model, mesh, rank_of_expert(stats), phases)


def rank_of_expert(stats: dict[str, Any]) -> np.ndarray:
    """Returns the rank of each expert, int ``[layers, experts]``, from ``placement`` in the engine's
    statistics. If that is absent, the ranks hold the experts in order and in equal shares."""
    layers, experts = len(stats["model"]["moe_layers"]), stats["model"]["experts"]
    ranks = stats["mesh"]["expert"]
    if stats.get("placement") is not None:
        return np.asarray(stats["placement"], np.int64)
    return np.broadcast_to(np.arange(experts) * ranks // experts, (layers, experts))


def load_by_rank(counts_LE: np.ndarray, rank_LE: np.ndarray) -> np.ndarray:
    """Returns the number of assignments to each rank's experts, int ``[layers, ranks]``."""
    layers, ranks = len(rank_LE), int(rank_LE.max(initial=0)) + 1
    places = np.arange(layers)[:, None] * ranks + rank_LE
    sums = np.bincount(places.ravel(), counts_LE.ravel(), layers * ranks)  # exact up to 2^53
    return sums.astype(np.int64).reshape(layers, ranks)


def window_report(old: Snapshot, new: Snapshot, phase: ReportPhase) -> dict[str, Any]:
    """Returns a JSON-able report of what happened from ``old`` to ``new``. A ratio or percentile of nothing
    is None."""
    return {
        "window_s": round(new.time - old.time, 3),
        "phase": phase,
        "model": new.model,
        "mesh": new.mesh,
        "moe": _moe_report(new.phases[phase].plus(old.phases[phase], -1), new),
        "serve": _serve_report(old, new),
    }


def _moe_report(counts: PhaseCounts, snapshot: Snapshot) -> dict[str, Any]:
    load_LR = load_by_rank(counts.counts_LE, snapshot.rank_LE)
    load_R, balance_L = load_LR.sum(0), [_max_over_mean(load_R) for load_R in load_LR]
    means_LM = counts.means_LM / max(counts.steps, 1)
    layers = [
        {
            "layer": number,
            **dict(zip(MEANS, means if counts.steps else [None] * len(MEANS), strict=True)),
            **dict(zip(SUMS, sums, strict=True)),
            "rank_max_over_mean": balance,
        }
        for number, means, sums, balance in zip(
            snapshot.model["moe_layers"], means_LM.tolist(), counts.sums_LS.tolist(), balance_L, strict=True
        )
    ]
    mean = means_LM.mean(0).tolist() if counts.steps else [None] * len(MEANS)
    return {
        "steps": counts.steps,
        **dict(zip(MEANS, mean, strict=True)),
        **dict(zip(SUMS, counts.sums_LS.sum(0).tolist(), strict=True)),
        "rank_load": load_R.tolist(),
        "rank_max_over_mean": _max_over_mean(load_R),
        "rank_of_expert": _placement(snapshot),
        "per_layer": layers,
        "counts": counts.counts_LE.tolist(),
    }


def _placement(snapshot: Snapshot) -> list[list[int]] | None:
    """Returns the rank of each expert; None if the ranks hold every layer's experts in order, in equal
    shares."""
    rank_LE = snapshot.rank_LE
    ranks, experts = snapshot.mesh["expert"], rank_LE.shape[1]
    in_order = (rank_LE == np.arange(experts) * ranks // experts).all()
    return None if in_order else rank_LE.tolist()


def _max_over_mean(load_R: np.ndarray) -> float | None:
    return round(float(load_R.max() / load_R.mean()), 4) if load_R.any() else None


def _serve_report(old: Snapshot, new: Snapshot) -> dict[str, Any]:
    before, totals, seconds = old.totals, new.totals, max(new.time - old.time, 1e-9)
    snapshot, was = new.snapshot, old.snapshot
    looked_up = snapshot.prefix_queries - was.prefix_queries
    return {
        "running": snapshot.num_running,
        "waiting": snapshot.num_waiting,
        "kv_usage": round(snapshot.kv_usage, 4),
        "prefix_queries": looked_up,
        "prefix_hits": snapshot.prefix_hits - was.prefix_hits,
        "prefill_tokens_per_second": round((totals.prompt_tokens - before.prompt_tokens) / seconds, 2),
        "decode_tokens_per_second": round((totals.generation_tokens - before.generation_tokens) / seconds, 2),
        "steps": totals.steps - before.steps,
        "time_to_first_token_ms": _percentiles(before.first_token, totals.first_token),
        "inter_token_latency_ms": _percentiles(before.between_tokens, totals.between_tokens),
        "step_ms": _percentiles(before.step, totals.step),
        "rejected": totals.rejected - before.rejected,
        "preemptions": snapshot.preemptions - was.preemptions,
        "compilations_after_warmup": snapshot.compilations_after_warmup,
    }


def _percentiles(old: TimeHistogram, new: TimeHistogram) -> dict[str, float | None]:
    counts = np.array(new.counts) - np.array(old.counts)
    found = {f"p{p}": percentile(counts, p / 100) for p in (50, 95, 99)}
    return {name: None if value is None else round(value * 1000, 3) for name, value in found.items()}
