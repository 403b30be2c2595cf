"""docs/results/capacity.md from the measured figures alone."""

from collections.abc import Callable
from typing import Any

from capacity_report_load import PAPER_LAYER, bundled_part, published_part, table
from capacity_report_quality import quality_part

# ---- speed


def speed_part(speed: dict[str, Any]) -> list[str]:
    names = ["drop/2", "drop/1.5", "drop/1", "expand/2", "expand/1.5", "expand/1"]
    sizes = "; ".join(
        f"{m}: {s['experts']} experts, top {s['k']}, model {s['model']}, inner {s['inner']}, "
        f"{s['tokens']} tokens a rank"
        for m, s in speed["shapes"].items()
    )
    scaled = " The sizes are scaled down, to what a CPU does in milliseconds."
    lines = [
        f"`{speed['command']}` on {speed['device']} ({speed['platform']}), {speed['rounds']} paired rounds. "
        f"{sizes}; bfloat16.{scaled if speed['platform'] == 'cpu' else ''} "
        f"Link {speed['link_gbs']:g} GB/s a rank each way, bfloat16 rows out and float32 back. A layer's "
        "time is the slowest rank's experts, the busiest rank's rows on the link, and the capacity stage. "
        "Cells: median speed-up over plain top-k (range over the rounds), and what the rows of the most "
        'loaded rank alone would give. In "stated peak" one expert has the load that the paper states for '
        "its models, the others are alike: made up, not measured routing.",
        "",
    ]
    for model, cases in speed["cases"].items():
        rows = []
        for name, case in cases.items():
            cells = [speed_cell(case[s]) for s in (*names, "eplb+8")]
            times = case["plain"]
            split = f"{1e3 * times['seconds']:.2f} ({1e3 * times['experts']:.2f})"
            rows.append([name, split, *cells])
        published = [f"{v:.2f}" for p in ("drop", "expand") for v in PAPER_LAYER[model][p]]
        rows.append(["**paper**, 8 x H20", "", *published, "-"])
        stage = speed["stage"][model]
        lines += [
            f"**{model}**; the stage takes {1e3 * stage['drop']:.2f} ms (drop), "
            f"{1e3 * stage['expand']:.2f} ms (expand)",
            "",
            *table(["routing", "plain, ms (experts)", *names, "EPLB"], rows),
        ]
    return lines


def speed_cell(timed: dict[str, Any]) -> str:
    median, low, high = timed["speedup"]
    return f"{median:.2f} ({low:.2f}..{high:.2f}); {timed['rows_ratio']:.2f}"


# ---- the document


def document(results: dict[str, Any]) -> str:
    """The whole file; a part that is not there says so."""
    parts: list[tuple[str, str, Callable[[], list[str]]]] = [
        ("Quality", "quality", lambda: [*quality_part(results["quality"]), image("quality")]),
        ("Straggler", "load", lambda: [PEAK, "", *straggler(results), image("load")]),
        ("Speed of a layer", "speed", lambda: [*speed_part(results["speed"]), image("speed")]),
        ("Speed of a layer, real sizes", "speed_gpu", lambda: speed_part(results["speed_gpu"])),
    ]
    lines = [INTRO, ""]
    for title, key, write in parts:
        lines += [f"## {title}", "", *(write() if key in results else [MISSING[key]]), ""]
    text = "\n".join([*lines, "## What appears of the paper, and what does not", "", DISCUSSION])
    return text.replace("\n\n\n", "\n\n")


def straggler(results: dict[str, Any]) -> list[str]:
    own = bundled_part(results["quality"]) if "quality" in results else []
    return [*own, *published_part(results["load"])]


def image(name: str) -> str:
    return f"![{name}](capacity_{name}.svg)"


RUN = "`python scripts/bench_capacity.py --data ../shared/data --parts"
MISSING = {
    "quality": f"Not measured yet: {RUN} quality`",
    "load": f"Not measured yet: {RUN} load`",
    "speed": f"Not yet measured on a quiet machine: {RUN} speed`",
    "speed_gpu": f"Not measured, never tried on a GPU: {RUN} speed --gpu`",
}
PEAK = (
    "Peaks: the greatest load over the even share of plain top-k's assignments, tokens x k / experts or "
    "tokens x k / devices. The denominator stays that of plain top-k, so that peaks compare as times do."
)
INTRO = "# Capacity-aware inference"
DISCUSSION = "TODO\n"
