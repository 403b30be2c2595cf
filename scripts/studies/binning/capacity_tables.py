"""Makes the tables of binning with a capacity for docs/results/binning.md."""

import math
from typing import Any

import numpy as np
from shared.results import perplexity_change, signed, table


def settings(capacity: dict[str, Any], batch: str) -> str:
    """Returns a batch size's table. It has a row for each width and capacity."""
    domains, length = len(capacity["domains"]), capacity["length"]
    widths = capacity["runs"][batch]
    plain_N, rows = np.array(widths["off"]["off"]["nll"]), []
    for width, by in widths.items():
        for name, row in distinct(by):
            loads = [f"{row['active']:.1f}", f"{row['expert_peak']:.2f}", f"{row['device_peak']:.2f}"]
            shares = [f"{100 * row[key]:.1f}" for key in ("remapped", "dropped", "rerouted")]
            loss = signed(*perplexity_change((np.array(row["nll"]) - plain_N) / (length - 1), domains), 2)
            rows.append([width, name, *loads, *shares, loss])
    head = ["affinity", "capacity", "active experts", "expert peak", "device peak"]
    return table([*head, "remapped, %", "dropped, %", "rerouted, %", "perplexity, %"], rows)


def distinct(row_by_name: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the settings by name. Those of one policy with equal figures become one: "drop/1, 1.5"."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, row in row_by_name.items():
        policy, _, factor = name.partition("/")
        if found and found[-1][0].startswith(f"{policy}/") and found[-1][1] == row:
            found[-1] = f"{found[-1][0]}, {factor}", row
        else:
            found.append((name, row))
    return found


def places(capacity: dict[str, Any]) -> str:
    """Returns the number of an expert's places on a rank at every gamma, by batch size."""
    found = []
    for batch in capacity["runs"]:
        even = int(batch) / capacity["ranks"] * 4 / 32
        counts = ", ".join(str(max(1, math.ceil(gamma * even))) for gamma in (1.0, 1.5, 2.0))
        found.append(f"{counts} at batch {batch}")
    return "; ".join(found)


def concentration(widths: dict[str, Any]) -> dict[str, Any]:
    """Returns the effect of binning at the strongest width.

    width: name of that width.
    times: factors by which it multiplies the peaks and the active experts.
    active: active experts per step at that width.
    rerouted: active experts per step after rerouting at gamma 1 too.
    """
    plain, (width, strongest) = widths["off"]["off"], list(widths.items())[-1]
    binned = strongest["off"]
    times = {key: binned[key] / plain[key] for key in ("expert_peak", "device_peak", "active")}
    again = strongest.get("reroute/1", binned)["active"]
    return {"width": width, "times": times, "active": binned["active"], "rerouted": again}
