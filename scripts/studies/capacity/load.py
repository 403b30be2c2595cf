"""Measures the straggler on published routing: load peaks before and after a capacity, and with EPLB.

Batches are drawn from token-level counts: each of 8 ranks has independent tokens of one domain. This is
milder than text, because the subjects of text come in runs. Marginal counts are published for more domains.
They give the peaks of a whole domain as one batch; a cut of this batch is exact in the limit of large, equal
ranks.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from shared.peaks import RANKS, device_peak, eplb_peak, expert_peak, rank_loads
from shared.published_routing import MODELS, SLOTS
from studies.capacity.drawn_routing import (
    Published,
    draw_ranks,
    limited_matrix,
    read_published,
)

from jmoe.config.techniques import CapacityConfig

FACTORS = (1.0, 1.25, 1.5, 2.0)
POLICIES = ("drop", "reroute", "expand")
EPLB_EXTRA = (0, RANKS)  # redundant experts: none, and one a rank
DRAWS = 4


def peaks(counts_E: np.ndarray, num_plain: float) -> list[float]:
    """Returns [expert peak, device peak, assignments over plain's]."""
    device = device_peak(rank_loads(counts_E), num_plain)
    return [expert_peak(counts_E, num_plain), device, float(counts_E.sum() / num_plain)]


def layer_loads(layer: Published, history: dict[str, np.ndarray], tokens: int) -> dict[str, Any]:
    """Returns ``peaks`` of plain top-k and of each policy and gamma, and device peaks of EPLB.

    All are means over the draws.

    layer: published routing of the layer.
    history: loads for which EPLB's placements are made, by name.
    tokens: number of tokens of each rank.
    """
    found: dict[str, list[Any]] = {}
    for draw in range(DRAWS):
        ids, scores = draw_ranks(layer, tokens, seed=draw)
        plain_E = limited_matrix(ids, scores, None).sum(0)
        total = float(plain_E.sum())
        found.setdefault("plain", []).append(peaks(plain_E, total))
        for policy in POLICIES:
            cfg = CapacityConfig(policy=policy)
            for factor in FACTORS:
                counts_E = limited_matrix(ids, scores, cfg, factor).sum(0)
                found.setdefault(f"{policy}/{factor:g}", []).append(peaks(counts_E, total))
        for name, history_E in history.items():
            for extra in EPLB_EXTRA:
                peak = eplb_peak(plain_E, history_E, extra)
                found.setdefault(f"eplb+{extra}/{name}", []).append(peak)
    return {name: np.round(np.mean(values, 0), 3).tolist() for name, values in found.items()}


def token_level(routing: Path, tokens: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Returns by model and domain the ``layer_loads`` of the layers."""
    published = read_published(routing)
    results: dict[str, Any] = {}
    for (model, domain), layers in published.items():
        rows = []
        for slot, layer in enumerate(layers):
            shares = {d: p[slot].often_V @ p[slot].chosen_VE for (m, d), p in published.items() if m == model}
            others = np.mean([share for d, share in shares.items() if d != domain], axis=0)
            rows.append(layer_loads(layer, {"own": shares[domain], "others": others}, tokens))
        results.setdefault(model, {})[domain] = rows
        print(f"{model} {domain}: drawn", flush=True)
    return results


def marginal(path: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Returns the peaks of plain top-k, drop and EPLB by model, domain and layer, from marginal counts."""
    with gzip.open(path, "rt") as file:
        counts = json.load(file)["counts"]
    results: dict[str, Any] = {}
    for name, by_domain in counts.items():
        model = "mixtral" if name == "mistral" else name
        for domain, layers in by_domain["topk"].items():
            rows = []
            for counts_E in map(np.asarray, layers):
                plain = float(counts_E.sum())
                row: dict[str, Any] = {"plain": peaks(counts_E, plain)}
                for factor in FACTORS:
                    kept_E = np.minimum(counts_E, factor * plain / counts_E.size)
                    row[f"drop/{factor:g}"] = peaks(kept_E, plain)
                for extra in EPLB_EXTRA:
                    row[f"eplb+{extra}/own"] = eplb_peak(counts_E, counts_E, extra)
                rows.append({key: np.round(value, 3).tolist() for key, value in row.items()})
            results.setdefault(model, {})[domain] = rows
    return results


def measure(routing: Path, tokens: int) -> dict[str, Any]:
    """Returns the ``load`` part of the results.

    routing: folder of the published routing.
    tokens: number of tokens of each rank.
    """
    return {
        "tokens": tokens,
        "draws": DRAWS,
        "layers": SLOTS,
        "models": {name: {"experts": e, "k": k} for name, (_, e, k) in MODELS.items()},
        "token_level": token_level(routing, tokens),
        "marginal": marginal(routing / "expert_counts.json.gz"),
    }
