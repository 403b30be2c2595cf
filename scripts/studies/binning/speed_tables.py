"""Makes the tables of speed for docs/results/binning.md."""

import statistics
from typing import Any

from shared.results import table

LEAST_R2, LEAST_GAIN = 0.95, 1.3  # targets: of the line, of the engine at batch 16 and half of the union


def met(holds: bool) -> str:
    return "met" if holds else "**missed**"


def layer(layer: dict[str, Any]) -> str:
    """Returns the table of a layer's time. It has a row for each number of active experts."""
    rows = []
    for active, seconds in layer["seconds"].items():
        read = int(active) * layer["expert_bytes"]
        rows.append([active, f"{read / 1e6:.0f}", f"{1e3 * seconds:.2f}", f"{read / seconds / 1e9:.1f}"])
    return table(["active experts", "weights read, MB", "ms a layer", "GB/s"], rows)


def engine(engine: dict[str, Any]) -> str:
    """Returns the table of the engine's speed. It has a row for each batch size."""
    rows = []
    for batch, row in engine["batches"].items():
        speeds = row["tokens_per_second"]
        ratio, least, most = row["ratio"]
        rows.append([
            batch, f"{row['width']:.2f}", f"{row['union']:.1f}", f"{row['active']:.1f} ({row['share']:.0%})",
            f"{statistics.median(speeds['jmoe']):.1f}", f"{statistics.median(speeds['binned']):.1f}",
            f"{ratio:.2f} ({least:.2f}..{most:.2f})", met(ratio >= LEAST_GAIN) if batch == "16" else "",
        ])  # fmt: skip
    head = ["batch", "width", "experts, plain", "binned", "tokens/s, plain", "binned", "ratio", "target"]
    return table(head, rows)


def gpu(gpu: dict[str, Any]) -> str:
    """Returns the table of a layer on a GPU. It has a row for each way to compute the layer."""
    plain, rows = gpu["seconds"]["plain"], []
    for name, seconds in gpu["seconds"].items():
        active = gpu["active"]["plain" if name == "plain" else "binned"]
        rate = active * gpu["expert_bytes"] / seconds / 1e12
        rows.append([name, f"{active:.1f}", f"{1e6 * seconds:.1f}", f"{rate:.2f}", f"{plain / seconds:.2f}"])
    return table(["route, bin, experts", "active experts", "us", "TB/s of weights", "speed-up"], rows)
