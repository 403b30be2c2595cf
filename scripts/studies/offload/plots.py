"""Draws the plot of docs/results/offload.md as SVG, with matplotlib (the ``plots`` extra)."""

from functools import partial
from typing import Any

from shared.results import Plot

SHOWN = ("LRU", "LFU", "request counts, LRU", "fMoE", "token table", "default", "oracle")


def plots(results: dict[str, Any]) -> dict[str, Plot]:
    """Returns the plot if its part has results."""
    if "simulate" not in results:
        return {}
    return {"offload_budget": partial(draw_budget, runs=results["simulate"]["runs"])}


def draw_budget(pyplot: Any, runs: dict[str, Any]) -> Any:
    """Draws hits and time against the share of experts on the device, at batch 1 and 8."""
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8))
    for name in SHOWN:
        for axis, batch, what in zip(axes, "181", ("hit", "hit", "tpot"), strict=True):
            found = {
                float(k.partition("/")[2]): v[name] for k, v in runs.items() if k.startswith(f"{batch}/")
            }
            scale = 100 if what == "hit" else 1
            axis.plot(
                [100 * s for s in found], [scale * f[what] for f in found.values()], "o-", ms=3, label=name
            )
    for axis, title in zip(axes, ("batch 1", "batch 8", "batch 1"), strict=True):
        axis.set(xlabel="experts on the device, %", title=title)
    axes[0].set_ylabel("hits, %")
    axes[1].set_ylabel("hits, %")
    axes[2].set_ylabel("time a token, decode layers")
    axes[0].legend(fontsize=7)
    return figure
