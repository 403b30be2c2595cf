"""Measures quality under a capacity: the bundled model's loss on the valid split, on 8 emulated expert ranks.

One prefill step takes ``rows`` windows a rank. The documents of a domain take turns with their windows. A
rank's capacity counts its own tokens, as on a cluster. Every document's loss is kept, so that any two
settings compare in pairs. There is one engine a policy, metric and scope, and gamma changes while it runs.

The effect of ``order`` and ``reverse_order`` depends on the tokens that a rank has: with one window, they are
its beginning or its end. Therefore the loss is also measured by position, and there is a control with four
windows of a quarter of the length a rank.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from shared.peaks import RANKS, device_peak, eplb_peak, expert_peak, rank_loads

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import CapacityConfig
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine
from jmoe.tools.data import bounded, read_documents, windows
from jmoe.tools.evaluate import PageRows

FACTORS = (1.0, 1.25, 1.5, 2.0)
METRICS = ("score", "random", "reverse_order", "order")
LOSSLESS = "lossless"
ORDERED = ("random", "reverse_order", "order")  # the metrics of "drop" in the control and by position
PARTS = 8  # parts of a window, for the loss by position
EPLB_EXTRA = 8  # redundant experts, one a rank

Piece = tuple[int, list[int]]  # the document's number in its domain, a window of its token ids


def capacities() -> list[CapacityConfig]:
    """Returns the measured capacities. All but expert_drop, which has no gamma, run at every gamma."""
    return [
        *(CapacityConfig(policy="drop", metric=metric) for metric in METRICS),
        CapacityConfig(policy="reroute"),
        CapacityConfig(policy="expand"),
        CapacityConfig(policy="expert_drop"),
        CapacityConfig(policy="drop", scope="device"),
        CapacityConfig(policy="expand", scope="device"),
    ]


def setting_name(cfg: CapacityConfig, factor: float) -> str:
    """Returns a setting's key in the results, for example "drop/score/expert/1.5"."""
    if cfg.policy == "expert_drop":
        return cfg.policy
    return f"{cfg.policy}/{cfg.metric}/{cfg.scope}/{factor:g}"


def pieces(engine: Engine, path: Path, budget: int, length: int) -> list[Piece]:
    """Returns all documents' first windows, then the second ones, until ``budget`` tokens are scored."""
    codec = engine.codec
    assert codec is not None
    each = [list(windows([codec.encode(d)], length)) for d in read_documents(path)]
    turns = itertools.zip_longest(*each)
    inturn = [(i, w) for turn in turns for i, w in enumerate(turn) if w is not None]
    cut = bounded((w for _, w in inturn), budget)
    return [(i, w) for (i, _), w in zip(inturn, cut, strict=False)]


class Meter:
    """Scores pieces on ``engine``'s ranks and keeps every step's loads.

    engine: engine that runs the windows.
    scorer: engine on one device, which turns hidden states into losses. On the mesh every rank would do
        all of that work.
    rows: number of windows on a rank in a step.
    """

    def __init__(self, engine: Engine, scorer: Engine, rows: int):
        self.runner, self.scorer, self.rows = engine.runner, scorer, rows
        self.table_BM, self.length = PageRows(engine, rows).table, engine.max_model_len

    def _steps(self, domain_pieces: list[Piece]) -> Iterator[list[Piece]]:
        size = self.runner.ranks * self.rows
        return (domain_pieces[at : at + size] for at in range(0, len(domain_pieces), size))

    def domain(self, domain_pieces: list[Piece]) -> dict[str, Any]:
        """Scores the pieces of a domain and returns their figures.

        nll: loss of each document.
        tokens: scored tokens of each document.
        steps: for each step, its assignments of plain top-k, and by layer those computed by each expert,
            those dropped and those rerouted.
        by_part: loss and tokens in each part of the window.
        """
        documents = 1 + max(i for i, _ in domain_pieces)
        nll, tokens, steps = np.zeros(documents), np.zeros(documents, int), []
        by_part = np.zeros((2, PARTS))
        before = self._counts()
        for batch in self._steps(domain_pieces):
            for (document, _), logprobs in zip(batch, self._step(batch), strict=True):
                nll[document] -= logprobs.sum(dtype=np.float64)
                tokens[document] += len(logprobs)
                part = np.arange(len(logprobs)) * PARTS // self.length
                by_part += [np.bincount(part, -logprobs, PARTS), np.bincount(part, minlength=PARTS)]
            now = self._counts()
            change = [b - a for a, b in zip(before, now, strict=True)]
            fed = sum(len(window) for _, window in batch)
            steps.append((fed * self.runner.cfg.num_experts_per_tok, *change))
            before = now
        return {"nll": nll, "tokens": tokens, "steps": steps, "by_part": by_part}

    def _counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.runner.drain()
        counters = self.runner.counters["prefill"]
        sums_L = counters.sums_L
        return counters.counts_LE.copy(), sums_L["dropped"].copy(), sums_L["rerouted"].copy()

    def _step(self, batch: list[Piece]) -> list[np.ndarray]:
        """Returns the log-probabilities of each window's tokens except the first."""
        longest = max(len(w) for _, w in batch)
        size = next(s for s in self.runner.sizes.prefill if s >= longest)  # a window in one run
        inputs = self.runner.blank("prefill", self.rows, size)
        targets = np.zeros_like(inputs.main_rows.tokens_BT)
        # Neighbours go to different ranks, so that a short batch leaves no rank empty.
        row_of = np.arange(len(inputs.main_rows.tokens_BT)).reshape(-1, self.rows).T.ravel()[: len(batch)]
        for row, (_, window) in zip(row_of, batch, strict=True):
            inputs.main_rows.tokens_BT[row, : len(window)] = window
            inputs.main_rows.positions_BT[row, : len(window)] = np.arange(len(window))
            inputs.main_rows.table_BM[row] = self.table_BM[row]
            targets[row, : len(window) - 1] = window[1:]
        hidden_RND = np.asarray(self.runner.run(inputs).hidden_RND)
        logprobs = np.asarray(self.scorer.runner.logprobs(hidden_RND, targets))  # pyright: ignore
        return [logprobs[row, : len(window) - 1] for row, (_, window) in zip(row_of, batch, strict=True)]


def summary(domains: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the JSON form of one setting. Peaks are by layer, means over the steps weighted by tokens."""
    steps = [step for d in domains.values() for step in d["steps"]]
    plain = sum(step[0] for step in steps) * len(steps[0][1])
    computed, dropped, rerouted = (sum(int(step[i].sum()) for step in steps) for i in (1, 2, 3))
    expert = [[expert_peak(c, n) for c in counts_LE] for n, counts_LE, *_ in steps]
    device = [[device_peak(rank_loads(c), n) for c in counts_LE] for n, counts_LE, *_ in steps]
    weights = [step[0] for step in steps]
    return {
        "nll": {name: d["nll"].round(3).tolist() for name, d in domains.items()},
        "dropped": dropped / plain,
        "rerouted": rerouted / plain,
        "extra": (computed + dropped) / plain - 1,
        "expert_peak_L": np.average(expert, 0, weights).round(4).tolist(),
        "device_peak_L": np.average(device, 0, weights).round(4).tolist(),
    }


def placements(domains: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Returns the device peaks by layer under redundant placement, as means in the way of ``summary``.

    own: peaks with a placement made for the domain's own load.
    others: peaks with a placement made for the load of the other domains.
    """
    total = {name: np.sum([s[1] for s in d["steps"]], 0) for name, d in domains.items()}
    peaks: dict[str, list[list[float]]] = {"own": [], "others": []}
    weights = [step[0] for d in domains.values() for step in d["steps"]]
    for name, d in domains.items():
        others = np.sum([t / t.sum() for other, t in total.items() if other != name], 0)
        for kind, history_LE in (("own", total[name]), ("others", others)):
            for _, counts_LE, *_ in d["steps"]:
                pairs = zip(counts_LE, history_LE, strict=True)
                peaks[kind].append([eplb_peak(c, h, EPLB_EXTRA) for c, h in pairs])
    return {kind: np.average(values, 0, weights).round(4).tolist() for kind, values in peaks.items()}


class Bench:
    """Runs of one model over one selection of windows.

    model: the model.
    valid: folder of the valid split.
    budget: number of tokens that are scored in a domain.
    length: length of a window in tokens.
    rows: number of windows on a rank in a step.
    """

    def __init__(self, model: str, valid: Path, budget: int, length: int, rows: int):
        alone = EngineSettings(max_num_seqs=rows * RANKS, max_model_len=length, max_num_batched_tokens=length)
        self.model, self.rows = model, rows
        self.scorer = build_engine(model, alone, warm_up=False)
        self.settings = dataclasses.replace(alone, expert_parallel_size=RANKS)
        self.pieces_by_domain = {
            path.name.split(".")[0]: pieces(self.scorer, path, budget, length)
            for path in sorted(valid.glob("*.txt.xz"))
        }

    def runs(
        self, cfg: CapacityConfig | None, factors: Sequence[float]
    ) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
        """Yields (name of the setting, ``Meter.domain`` of every domain) for every gamma, from one engine."""
        settings = dataclasses.replace(self.settings, moe=MoEConfig(capacity=cfg))
        with closing(build_engine(self.model, settings, warm_up=False)) as engine:
            meter = Meter(engine, self.scorer, self.rows)
            for factor in factors if cfg and cfg.policy != "expert_drop" else (1.0,):
                start, name = time.perf_counter(), setting_name(cfg, factor) if cfg else LOSSLESS
                engine.runner.knobs["capacity.factor"] = factor
                found = {domain: meter.domain(each) for domain, each in self.pieces_by_domain.items()}
                mean = sum(d["nll"].sum() for d in found.values()) / sum(
                    d["tokens"].sum() for d in found.values()
                )
                print(f"{name}: {mean:.4f} nats a token, {time.perf_counter() - start:.0f} s", flush=True)
                yield name, found


def by_part(domains: dict[str, dict[str, Any]]) -> list[float]:
    """Returns the nats a token in each part of the window, over all domains."""
    nll, tokens = np.sum([d["by_part"] for d in domains.values()], 0)
    return (nll / np.maximum(tokens, 1)).round(4).tolist()


def measure(model: str, valid: Path, budget: int, length: int, rows: int) -> dict[str, Any]:
    """Returns the ``quality`` part of the results."""
    start, bench = time.perf_counter(), Bench(model, valid, budget, length, rows)
    [(_, plain)] = bench.runs(None, ())
    settings, positions = {LOSSLESS: summary(plain)}, {LOSSLESS: by_part(plain)}
    for cfg in capacities():
        for name, found in bench.runs(cfg, FACTORS):
            settings[name] = summary(found)
            if name in [setting_name(c, FACTORS[0]) for c in ordered()]:
                positions[name] = by_part(found)
    return {
        "budget": budget,
        "length": length,
        "rows": rows,
        "tokens": {name: d["tokens"].tolist() for name, d in plain.items()},
        "settings": settings,
        "placement": placements(plain),
        "positions": positions,
        "control": control(model, valid, budget, length // 4, 4 * rows),
        "seconds": round(time.perf_counter() - start),
    }


def ordered() -> list[CapacityConfig]:
    return [CapacityConfig(policy="drop", metric=metric) for metric in ORDERED]


def control(model: str, valid: Path, budget: int, length: int, rows: int) -> dict[str, Any]:
    """Measures drop with the metrics ``ORDERED`` at the least gamma, with other windows on a rank."""
    bench = Bench(model, valid, budget, length, rows)
    settings, tokens = {}, {}
    for cfg in (None, *ordered()):
        for name, found in bench.runs(cfg, FACTORS[:1]):
            settings[name] = {"nll": {d: f["nll"].round(3).tolist() for d, f in found.items()}}
            tokens = {d: f["tokens"].tolist() for d, f in found.items()}
    return {"length": length, "rows": rows, "tokens": tokens, "settings": settings}
