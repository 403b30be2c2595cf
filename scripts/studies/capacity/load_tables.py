"""Makes the tables of the straggler for docs/results/capacity.md."""

from typing import Any

import numpy as np
from shared.results import table

FACTORS = (2.0, 1.5, 1.25, 1.0)
LOSSLESS = "lossless"
POLICIES = ("drop", "reroute", "expand")
LIMITED = [f"{policy}, gamma = 2 / 1.5 / 1.25 / 1" for policy in POLICIES]
PAPER_LAYER = {  # Capacity-Aware Inference: the speed-up of one layer at gamma 2.0, 1.5 and 1.0
    "mixtral": {"drop": (1.44, 1.89, 2.55), "expand": (1.43, 1.86, 2.51)},
    "olmoe": {"drop": (1.21, 1.30, 1.46), "expand": (1.16, 1.25, 1.36)},
}


def at(kind: str, factor: float) -> str:
    return f"{kind}/{factor:g}"


def limited(quality: dict[str, Any], kind: str, layer: int) -> list[str]:
    """Returns the row of one layer of the bundled model: its peaks, plain and by policy and gamma."""
    settings = quality["settings"]

    def four(policy: str) -> str:
        return " / ".join(f"{settings[at(f'{policy}/score/expert', f)][kind][layer]:.2f}" for f in FACTORS)

    return [str(layer), f"{settings[LOSSLESS][kind][layer]:.2f}", *map(four, POLICIES)]


def experts(quality: dict[str, Any]) -> str:
    layers = range(len(quality["settings"][LOSSLESS]["expert_peak_L"]))
    return table(["layer", "plain", *LIMITED], [limited(quality, "expert_peak_L", i) for i in layers])


def devices(quality: dict[str, Any]) -> str:
    """Returns the table of the bundled model's most loaded device, with EPLB. It has a row for each layer."""
    own, others = (quality["placement"][kind] for kind in ("own", "others"))
    rows = [
        [*limited(quality, "device_peak_L", i), f"{own[i]:.2f}", f"{others[i]:.2f}"] for i in range(len(own))
    ]
    return table(["layer", "plain", *LIMITED, "EPLB, own domain", "EPLB, others"], rows)


def published(load: dict[str, Any], model: str) -> str:
    """Returns the table of a model's most loaded device. It has a row for each domain and layer."""
    rows = [
        [f"{domain} {number}", *peak_cells(layer), *eplb_cells(layer)]
        for domain, layers in load["token_level"][model].items()
        for number, layer in zip(load["layers"], layers, strict=True)
    ]
    return table(["domain, layer", "plain", *LIMITED, "EPLB, own", "EPLB, others"], rows)


def plain_peaks(domains: dict[str, Any]) -> list[float]:
    """Returns the peak of plain top-k's most loaded expert for every domain and layer."""
    return [layer["plain"][0] for layers in domains.values() for layer in layers]


def peak_cells(layer: dict[str, Any]) -> list[str]:
    """Returns the peaks of devices, plain and by policy and gamma."""
    limited = (" / ".join(f"{layer[at(policy, f)][1]:.2f}" for f in FACTORS) for policy in POLICIES)
    return [f"{layer['plain'][1]:.2f}", *limited]


def eplb_cells(layer: dict[str, Any]) -> list[str]:
    return [f"{layer[f'eplb+8/{kind}']:.2f}" for kind in ("own", "others")]


def bounds(model: str, domains: dict[str, Any]) -> str:
    """Returns the table of the gains that the peaks alone allow a layer, and of the paper's speed-ups."""
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


def marginal(load: dict[str, Any]) -> str:
    """Returns the table of the domains that have only marginal counts."""
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
    return table([*head, "rearranged only", "EPLB, own"], rows)
