"""Draws the plots of docs/results/capacity.md as SVG, with matplotlib (the ``plots`` extra)."""

from functools import partial
from typing import Any

import numpy as np
from shared.results import Plot
from studies.capacity.load_tables import FACTORS, LOSSLESS, PAPER_LAYER, at
from studies.capacity.quality_tables import KINDS, difference

SHOWN = ("drop", "reroute", "expand")


def plots(results: dict[str, Any]) -> dict[str, Plot]:
    """Returns the plot ``capacity_<part>`` of every part that has results."""
    every = {"quality": draw_quality, "load": draw_load, "speed": draw_speed}
    return {
        f"capacity_{part}": partial(plot, results=results) for part, plot in every.items() if part in results
    }


def draw_quality(pyplot: Any, results: dict[str, Any]) -> Any:
    """Draws the damage against gamma, with two standard errors."""
    quality = results["quality"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    metrics = [name for name, kind in KINDS.items() if kind.startswith("drop") and kind.endswith("expert")]
    policies = [name for name, kind in KINDS.items() if kind.split("/")[1] == "score"]
    for axis, names, title in zip(
        axes, (metrics, policies), ("drop: by metric", "metric score: by policy and scope"), strict=True
    ):
        for name in names:
            points = np.array([difference(quality, at(KINDS[name], f)) for f in FACTORS])
            axis.errorbar(FACTORS, points[:, 0], 2 * points[:, 1], label=name, marker="o", ms=3, capsize=2)
        level = difference(quality, "expert_drop")[0]
        axis.axhline(level, color="grey", ls=":", label="expert_drop")
        axis.set(title=title, xlabel="gamma", ylabel="nats a token over lossless", xticks=FACTORS)
        axis.legend(fontsize=7)
    return figure


def draw_load(pyplot: Any, results: dict[str, Any]) -> Any:
    """Draws the peaks by layer, plain and at gamma 1.5."""
    load, panels = results["load"], []
    if "quality" in results:
        settings = results["quality"]["settings"]
        for kind in ("expert", "device"):
            key = f"{kind}_peak_L"
            bars = {"plain": settings[LOSSLESS][key]}
            bars |= {p: settings[f"{p}/score/expert/1.5"][key] for p in SHOWN}
            if kind == "device":
                bars["EPLB, others"] = results["quality"]["placement"]["others"]
            names = [f"layer {i}" for i in range(len(bars["plain"]))]
            panels.append((f"bundled model, {kind}", names, bars))
    for model, domains in load["token_level"].items():
        layers = [layer for rows in domains.values() for layer in rows]
        bars = {"plain": [layer["plain"][1] for layer in layers]}
        bars |= {p: [layer[f"{p}/1.5"][1] for layer in layers] for p in SHOWN}
        bars["EPLB, others"] = [layer["eplb+8/others"] for layer in layers]
        names = [f"{d} {n}" for d in domains for n in load["layers"]]
        panels.append((f"{model}, device", names, bars))
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6))
    for axis, (title, names, bars) in zip(axes.flat, panels, strict=False):
        width = 0.8 / len(bars)
        for i, (name, values) in enumerate(bars.items()):
            axis.bar(np.arange(len(values)) + i * width, values, width, label=name)
        axis.set_xticks(np.arange(len(names)) + 0.4 - width / 2, names, rotation=45, ha="right", fontsize=7)
        axis.axhline(1, color="black", lw=0.6)
        axis.set(title=title, ylabel="peak at gamma = 1.5")
        axis.legend(fontsize=6, loc="lower right")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    return figure


def draw_speed(pyplot: Any, results: dict[str, Any]) -> Any:
    """Draws the speed-ups of every routing against gamma, and the paper's."""
    cases = results["speed"]["cases"]
    gammas = (2.0, 1.5, 1.0)
    figure, axes = pyplot.subplots(1, len(cases), figsize=(9, 3.4), squeeze=False)
    for axis, (model, routings) in zip(axes.flat, cases.items(), strict=True):
        for name, case in routings.items():
            axis.plot(
                gammas, [case[at("drop", f)]["speedup"][0] for f in gammas], marker="o", ms=3, label=name
            )
        axis.plot(gammas, PAPER_LAYER[model]["drop"], "k--", marker="s", ms=4, label="paper")
        axis.set(title=f"{model}, drop", xlabel="gamma", ylabel="speed-up of the layer", xticks=gammas)
        axis.legend(fontsize=6)
    return figure
