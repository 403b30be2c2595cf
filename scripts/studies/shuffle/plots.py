"""Draws the plots of docs/results/shuffle.md as SVG, with matplotlib (the ``plots`` extra)."""

from functools import partial
from typing import Any

import numpy as np
from shared.results import Plot


def plots(results: dict[str, Any]) -> dict[str, Plot]:
    """Returns the plots of every part that has results."""
    found: dict[str, Plot] = {}
    if "grouping" in results:
        found["shuffle_local"] = partial(draw_local, grouping=results["grouping"])
    if "bytes" in results:
        found["shuffle_bytes"] = partial(draw_bytes, figures=results["bytes"])
    return found


def draw_local(pyplot: Any, grouping: dict[str, Any]) -> Any:
    """Draws the local rates by devices, in-domain, and the saved remote activations by domain, across."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    inside = grouping["in_domain"]
    names = [name for name, row in inside["8"].items() if isinstance(row, dict)]
    for i, name in enumerate(names):
        heights = [100 * inside[ranks][name]["steps"]["256"]["tables"]["local"] for ranks in inside]
        left.bar(np.arange(len(inside)) + 0.12 * i, heights, 0.11, label=name)
    for i, ranks in enumerate(inside):
        left.plot([i - 0.1, i + 0.7], [100 / int(ranks)] * 2, "k:", lw=1)
    left.set_xticks(np.arange(len(inside)) + 0.3, [f"{ranks} devices" for ranks in inside])
    left.set(ylabel="local activations, %", title="in-domain, steps of 256; dotted: by chance")
    left.legend(fontsize=7)
    across = grouping["across"]
    for i, name in enumerate(("alternating", "random")):
        kept = [1 - row[name]["steps"]["256"]["tables"]["local"] for row in across.values()]
        right.barh(np.arange(len(across)) + 0.4 * i, 100 * (1 - np.array(kept) / 0.875), 0.38, label=name)
    right.axvline(15, color="grey", ls=":")
    right.set_yticks(np.arange(len(across)) + 0.2, list(across), fontsize=7)
    right.set(xlabel="fewer remote activations, %", title="domain left out, 8 devices, with tables")
    right.legend(fontsize=7)
    return figure


def draw_bytes(pyplot: Any, figures: dict[str, Any]) -> Any:
    """Draws the bytes per token on every pipeline, as a share of plain's."""
    figure, axis = pyplot.subplots(figsize=(8, 4))
    shapes = {name: shape for name, shape in figures["shapes"].items() if name.endswith("/8")}
    for i, shape in enumerate(shapes.values()):
        rows = shape["rows"]
        values = [row["bytes"] / rows["plain"]["bytes"] for row in rows.values()]
        axis.barh(np.arange(len(rows)) + 0.4 * i, values, 0.38, label=f"k {shape['k']}, D {shape['width']}")
        axis.set_yticks(np.arange(len(rows)) + 0.2, list(rows), fontsize=7)
    axis.axvline(1, color="grey", ls=":")
    axis.invert_yaxis()
    axis.set(xlabel="bytes of a layer over plain's, 8 devices")
    axis.legend(fontsize=7)
    return figure
