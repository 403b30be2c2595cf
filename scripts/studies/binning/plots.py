"""Draws the plots of docs/results/binning.md as SVG, with matplotlib (the ``plots`` extra)."""

import statistics
from functools import partial
from typing import Any

import numpy as np
from shared.results import Plot, perplexity_change
from studies.binning.curves import METHODS, curves
from studies.binning.quality_tables import ALLOWED, BATCH, SAVED, plain_protocols


def plots(results: dict[str, Any]) -> dict[str, Plot]:
    """Returns the plots of every part that has results."""
    found: dict[str, Plot] = {}
    if "quality" in results:
        found["binning_quality"] = partial(draw_quality, quality=results["quality"])
        found["binning_batch"] = partial(draw_batch, quality=results["quality"])
    if "speed" in results:
        found["binning_speed"] = partial(draw_speed, speed=results["speed"])
    return found


def draw_quality(pyplot: Any, quality: dict[str, Any]) -> Any:
    """Draws perplexity change against active experts at the target's batch, with two standard errors."""
    domains = len(quality["domains"])
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for axis, mix in zip(axes, ("single", "mixed"), strict=True):
        for method, curve in curves(quality, f"{mix}/{BATCH}").items():
            points = np.array([perplexity_change(delta_N, domains) for delta_N in curve.delta_SN])
            axis.errorbar(
                curve.ratio_S, points[:, 0], 2 * points[:, 1], label=method, marker="o", ms=3, capsize=2
            )
        axis.axhline(ALLOWED, color="grey", ls=":")
        axis.axvline(1 - SAVED, color="grey", ls=":")
        axis.set_yscale("symlog", linthresh=1)
        axis.set(title=f"{mix}-domain batches of {BATCH}", xlabel="active experts over plain top-k's")
        axis.set(ylabel="perplexity change, %", ylim=(-2, 50), yticks=[-1, 0, 1, 10])
        axis.set_yticklabels(["-1", "0", "1", "10"])
        axis.legend(fontsize=7, ncols=3, loc="lower right")
    return figure


def draw_batch(pyplot: Any, quality: dict[str, Any]) -> Any:
    """Draws the active share by batch size, for one setting of each method, single and mixed."""
    figure, axis = pyplot.subplots(figsize=(6, 3.6))
    shown = {method: middle(quality, method) for method in METHODS if method in ("affinity", "oea")}
    for mix, style in (("single", "-"), ("mixed", "--")):
        runs = {
            int(n.split("/")[1]): quality["runs"][n] for n in plain_protocols(quality) if n.startswith(mix)
        }
        for color, name in enumerate(shown.values()):
            shares = [run[name]["active"] / run[name]["plain"] for run in runs.values()]
            axis.plot(list(runs), shares, style, color=f"C{color}", marker="o", ms=3, label=f"{name}, {mix}")
    axis.set_xscale("log", base=2)
    sizes = sorted({int(name.split("/")[1]) for name in plain_protocols(quality)})
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set(xlabel="batch", ylabel="active experts over plain top-k's", ylim=(0, 1))
    axis.legend(fontsize=7)
    return figure


def middle(quality: dict[str, Any], method: str) -> str:
    """Returns the name of the middle one of a method's settings."""
    names = [n for n in quality["runs"][plain_protocols(quality)[0]] if n.startswith(f"{method}/")]
    return names[(len(names) - 1) // 2]


def draw_speed(pyplot: Any, speed: dict[str, Any]) -> Any:
    """Draws a layer's time against active experts with the fitted line, and the engine's tokens/s."""
    layer, batches = speed["layer"], speed["engine"]["batches"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    active = np.array([int(n) for n in layer["seconds"]])
    left.plot(active, [1e3 * s for s in layer["seconds"].values()], "o", ms=4)
    left.plot(active, 1e3 * (layer["fixed"] + layer["each"] * active), "-", lw=1)
    left.set(title=f"a layer, R^2 {layer['r_squared']:.4f}", xlabel="active experts", ylabel="ms")
    left.set(xlim=(0, None), ylim=(0, None))
    for i, name in enumerate(("jmoe", "binned")):
        heights = [statistics.median(row["tokens_per_second"][name]) for row in batches.values()]
        label = "plain top-k" if name == "jmoe" else "binned"
        right.bar(np.arange(len(heights)) + 0.4 * i, heights, 0.38, label=label)
    right.set_xticks(np.arange(len(batches)) + 0.2, [f"batch {batch}" for batch in batches])
    right.set(title="engine, decode", ylabel="tokens/s")
    right.legend(fontsize=7)
    return figure
