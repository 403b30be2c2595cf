"""Tables of loads for docs/results/capacity.md."""

from typing import Any

import numpy as np
from shared.results import table

FACTORS = (2.0, 1.5, 1.25, 1.0)
LOSSLESS = "lossless"
PAPER_LAYER = {  # Capacity-Aware Inference, speed-up of one layer at gamma 2.0, 1.5, 1.0
    "mixtral": {"drop": (1.44, 1.89, 2.55), "expand": (1.43, 1.86, 2.51)},
    "olmoe": {"drop": (1.21, 1.30, 1.46), "expand": (1.16, 1.25, 1.36)},
}


def at(kind: str, factor: float) -> str:
    return f"{kind}/{factor:g}"


def bundled_part(quality: dict[str, Any]) -> list[str]:
    settings, placement = quality["settings"], quality["placement"]

    def row(layer: int, kind: str) -> list[str]:
        def four(policy: str) -> str:
            values = (settings[at(f"{policy}/score/expert", f)][kind][layer] for f in FACTORS)
            return " / ".join(f"{v:.2f}" for v in values)

        return [f"{settings[LOSSLESS][kind][layer]:.2f}", *map(four, ("drop", "reroute", "expand"))]

    layers = range(len(settings[LOSSLESS]["expert_peak_L"]))
    head = ["layer", "plain", *(f"{p}, gamma = 2 / 1.5 / 1.25 / 1" for p in ("drop", "reroute", "expand"))]
    return [
        "### The bundled model, its own routing",
        "",
        "Most loaded expert (of 32), mean over the quality runs' steps, weighted by tokens:",
        "",
        *table(head, [[str(i), *row(i, "expert_peak_L")] for i in layers]),
        "Most loaded device (of 8, four experts each). EPLB has one redundant expert a device; it is placed "
        "for the step's own domain (the load it then meets: a best case) or for the other domains:",
        "",
        *table(
            [*head, "EPLB, own domain", "EPLB, others"],
            [
                [str(i), *row(i, "device_peak_L"), *(f"{placement[k][i]:.2f}" for k in ("own", "others"))]
                for i in layers
            ],
        ),
    ]


def published_part(load: dict[str, Any]) -> list[str]:
    lines = [
        "### Published routing of Mixtral-8x7B and OLMoE",
        "",
        f"`{load['command']}`",
        "",
        f"Token-level counts, {load['draws']} draws of 8 ranks x {load['tokens']} independent tokens of one "
        "domain. How many of a rank's candidates an expert keeps does not depend on the metric "
        "(min(load, C)), so drop's and expand's figures hold for every metric. Router scores are not "
        "published: reroute's next-best experts are the token id's most frequent ones, a stand-in. Most "
        "loaded device; with Mixtral's 8 experts on 8 devices that is the most loaded expert too. EPLB: one "
        "redundant expert a device (for Mixtral that doubles the experts' memory), placed for the domain's "
        "own counts or the other domains'.",
        "",
    ]
    for model, domains in load["token_level"].items():
        rows = []
        for domain, layers in domains.items():
            for number, layer in zip(load["layers"], layers, strict=True):
                rows.append([f"{domain} {number}", *peak_cells(layer, 1), *eplb_cells(layer)])
        names = [f"{p}, gamma = 2 / 1.5 / 1.25 / 1" for p in ("drop", "reroute", "expand")]
        experts = [layer["plain"][0] for layers in domains.values() for layer in layers]
        lines += [
            f"**{model}** (plain top-k's most loaded expert: {min(experts):.2f} to {max(experts):.2f}; after "
            "drop or reroute at most gamma)",
            "",
            *table(["domain, layer", "plain", *names, "EPLB, own", "EPLB, others"], rows),
            *bound_lines(model, domains),
        ]
    return lines + marginal_lines(load)


def peak_cells(layer: dict[str, Any], kind: int) -> list[str]:
    """kind: 0 expert, 1 device."""
    cells = [f"{layer['plain'][kind]:.2f}"]
    for policy in ("drop", "reroute", "expand"):
        cells.append(" / ".join(f"{layer[at(policy, f)][kind]:.2f}" for f in FACTORS))
    return cells


def eplb_cells(layer: dict[str, Any]) -> list[str]:
    return [f"{layer[f'eplb+8/{kind}']:.2f}" for kind in ("own", "others")]


def bound_lines(model: str, domains: dict[str, Any]) -> list[str]:
    """What the peaks alone allow a layer to gain, beside the paper's speed-ups."""
    layers = [layer for layers in domains.values() for layer in layers]

    def spread(key: str) -> str:
        peaks = [layer[key][1] if isinstance(layer[key], list) else layer[key] for layer in layers]
        gains = [layer["plain"][1] / peak for layer, peak in zip(layers, peaks, strict=True)]
        return f"{np.mean(gains):.2f} ({min(gains):.2f}..{max(gains):.2f})"

    rows = [
        [policy, *(spread(at(policy, f)) for f in FACTORS), paper(model, policy)]
        for policy in ("drop", "expand", "reroute")
    ]
    for policy in ("drop", "expand", "reroute"):
        computed = [[layer[at(policy, f)][2] for layer in layers] for f in FACTORS]
        rows.append(
            [f"{policy}: assignments computed, %", *(f"{100 * np.mean(c):.1f}" for c in computed), "-"]
        )
    rows += [[f"EPLB, {kind}", spread(f"eplb+8/{kind}"), "", "", "", "-"] for kind in ("own", "others")]
    head = [
        "layer gain that the loads allow",
        *(f"gamma = {f:g}" for f in FACTORS),
        "paper, 2 / 1.5 / 1",
    ]
    return table(head, rows)


def paper(model: str, policy: str) -> str:
    values = PAPER_LAYER[model].get(policy)
    return " / ".join(f"{v:.2f}" for v in values) if values else "-"


def marginal_lines(load: dict[str, Any]) -> list[str]:
    rows = []
    for model, domains in load["marginal"].items():
        for domain, layers in domains.items():
            if domain in load["token_level"].get(model, {}):
                continue
            for number, layer in zip(load["layers"], layers, strict=True):
                drop = " / ".join(f"{layer[at('drop', f)][1]:.2f}" for f in FACTORS)
                plain = [f"{layer['plain'][kind]:.2f}" for kind in (0, 1)]
                eplb = [f"{layer[f'eplb+{extra}/own']:.2f}" for extra in (0, 8)]
                rows.append([f"{model}, {domain} {number}", *plain, drop, *eplb])
    head = ["model, domain, layer", "expert", "device", "device after drop, gamma = 2 / 1.5 / 1.25 / 1"]
    return [
        "Domains with marginal counts only (some 205,000 tokens as one batch; the cut as with large, equal "
        "ranks):",
        "",
        *table([*head, "rearranged only", "EPLB, own"], rows),
    ]
