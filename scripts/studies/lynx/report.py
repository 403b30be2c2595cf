"""docs/results/lynx.md from the measured figures alone."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from shared.results import signed, table
from studies.lynx.curves import percent
from studies.lynx.report_quality import quality_part
from studies.lynx.report_speed import gpu_part, speed_part

# ---- with a capacity


def capacity_part(capacity: dict[str, Any]) -> list[str]:
    domains, length = len(capacity["domains"]), capacity["length"]
    lines = [
        f"`{capacity['command']}` ({capacity['seconds'] / 60:.0f} minutes)",
        "",
        f"The bundled model on {capacity['ranks']} expert ranks, emulated; {capacity['windows']} windows of "
        f"{length} tokens of each domain, decoded in mixed batches. Binning comes first, then the capacity, "
        "which counts each rank's own tokens; a capacity in decode is our extension (the paper limits "
        "prefill). Peaks are means over layers and steps, over the even share of plain top-k's "
        "assignments. An expert's places on a rank, ceil(gamma x tokens x 4 / 32), at gamma 1, 1.5 and 2: "
        f"{places(capacity)}; where they are the same, so is the setting, and its row is one.",
        "",
    ]
    for batch, widths in capacity["runs"].items():
        plain_N, rows = np.array(widths["off"]["off"]["nll"]), []
        for width, by in widths.items():
            for name, row in distinct(by):
                loads = [f"{row['active']:.1f}", f"{row['expert_peak']:.2f}", f"{row['device_peak']:.2f}"]
                shares = [f"{100 * row[key]:.1f}" for key in ("remapped", "dropped", "rerouted")]
                loss = signed(*percent((np.array(row["nll"]) - plain_N) / (length - 1), domains), 2)
                rows.append([width, name, *loads, *shares, loss])
        head = ["affinity", "capacity", "active experts", "expert peak", "device peak"]
        head += ["remapped, %", "dropped, %", "rerouted, %", "perplexity, %"]
        lines += [
            f"Batch {batch}, {int(batch) // capacity['ranks']} sequences a rank:",
            "",
            *table(head, rows),
        ]
    return [*lines, *concentration(capacity)]


def distinct(by: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The settings by name, those of one policy that gave the same figures as one: "drop/1, 1.5"."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, row in by.items():
        policy, _, factor = name.partition("/")
        if found and found[-1][0].startswith(f"{policy}/") and found[-1][1] == row:
            found[-1] = f"{found[-1][0]}, {factor}", row
        else:
            found.append((name, row))
    return found


def places(capacity: dict[str, Any]) -> str:
    found = []
    for batch in capacity["runs"]:
        even = int(batch) / capacity["ranks"] * 4 / 32
        found.append(
            f"{', '.join(str(max(1, math.ceil(g * even))) for g in (1.0, 1.5, 2.0))} at batch {batch}"
        )
    return "; ".join(found)


def concentration(capacity: dict[str, Any]) -> list[str]:
    """What binning alone does to the peaks, and rerouting to binning, from the strongest setting."""
    lines = []
    for batch, widths in capacity["runs"].items():
        plain, (width, strongest) = widths["off"]["off"], list(widths.items())[-1]
        binned = strongest["off"]
        expert, device = (binned[key] / plain[key] for key in ("expert_peak", "device_peak"))
        again = strongest.get("reroute/1", binned)["active"]
        lines.append(
            f"* Batch {batch}: binning at {width} alone multiplies the expert peak by {expert:.2f} and the "
            f"device peak by {device:.2f}, with {binned['active'] / plain['active']:.0%} of the active "
            f"experts. Rerouting at gamma 1 knows nothing of the active set: {binned['active']:.1f} active "
            f"experts become {again:.1f}."
        )
    return lines


# ---- the document


def document(results: dict[str, Any]) -> str:
    """The whole file; a part that is not there says so."""
    parts: list[tuple[str, str, Callable[[dict[str, Any]], list[str]]]] = [
        ("Quality", "quality", quality_part),
        ("With a capacity", "capacity", capacity_part),
        ("Speed", "speed", speed_part),
        ("A layer on a GPU", "speed_gpu", gpu_part),
    ]
    lines = [INTRO, ""]
    for title, key, write in parts:
        run = f"`python scripts/bench_lynx.py --data ../shared/data --parts {key.replace('_gpu', ' --gpu')}`"
        lines += [
            f"## {title}",
            "",
            *(write(results[key]) if key in results else [f"Not measured yet: {run}"]),
            "",
        ]
    return "\n".join([*lines, LIMITS, ""]).replace("\n\n\n", "\n\n")


INTRO = """# LYNX: batch-aware affinity binning

What sending a decode batch to fewer experts costs in quality and what it buys in time, beside the papers:
LYNX (Gupta et al., arXiv 2411.08982) and OEA (Oncescu et al., arXiv 2511.02237). Methods: `affinity` (our
reading of LYNX's rule, by width in nats), `oea` (by k0), and three that keep a share of the batch's experts,
by affinity (`budget`), by votes (`popularity`) or drawn (`random`). Each part names its command; all figures
are in `lynx.json`, and `python scripts/bench_lynx.py --parts` makes text and plots (the `plots` extra) from
it alone. Quality and capacity are deterministic but for the last bits of floating point."""
LIMITS = """## Limits

One model of 12.8 M parameters and four domains; perplexity, not tasks, on short windows. The papers' models
have 64 to 256 experts, top 6 to 8; this one has 32, top 4. Speed is of random weights, whose tokens share no
subject: a batch touches more experts than one of text would, and the calibrated width is not one to use on a
real model."""
