"""docs/results/capacity.md from the measured figures alone."""

from collections.abc import Callable
from typing import Any

from shared.results import table
from studies.capacity.report_load import PAPER_LAYER, bundled_part, published_part
from studies.capacity.report_quality import quality_part

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
        f"`{speed['command']}` on {speed['device']}, {speed['rounds']} paired rounds. "
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
    text = "\n".join([*lines, "## What appears of the paper, and what does not", "", DISCUSSION, ""])
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
INTRO = """# Capacity-aware inference

What a limit on the experts' load costs in quality and what it buys in balance and time, beside the paper
(He et al., arXiv 2503.05066): C = gamma x tokens x k / experts on each rank's own tokens, in prefill. The
commands below measure one part each and write this file; all figures are in `capacity.json`, and
`python scripts/bench_capacity.py --parts` makes text and plots (the `plots` extra) from it alone. Quality and
straggler are deterministic but for the last bits of floating point."""
DISCUSSION = """Appears:

* Score is by far the best metric: 25 to 30 % of random's damage at every gamma (the paper's OLMoE table, in
  points: 27 % at gamma = 1, less above).
* Rerouting loses a little less than dropping at every gamma, beyond the error.
* A limit on devices costs far less than one on experts: at gamma = 1 less than an expert's at 2 (in the
  paper's Qwen3 table less than an expert's at 1.5). It is the device that a layer waits for.
* OLMoE's loads allow a layer to gain what the paper reports and more; single layers and domains spread far
  wider than its one figure a gamma.

Does not appear, and why:

* **"Random < order" needs several texts on a rank.** With one window a rank, order and random are equal and
  reverse order is the worst. The table by position shows what happens: order takes experts from the end of
  the window and leaves its beginning alone; reverse order takes them from the beginning, where no context
  makes up for it, and the damage fades only slowly along the window. With four windows a rank (the control)
  order takes whole later windows, beginnings included, and is worse than random, as in the paper, whose
  batches hold many texts. There the paper's two orders are alike; here reverse order stays the worse one.
* **Expand gains nothing over drop**, within the error. The paper's gain is small too, and on OLMoE base at
  gamma = 1 there is none (61.2 against 61.1). Here the extra assignments, up to 16 %, are a rank's own four
  experts of 32 for tokens whose router ranked them lower; that they weigh little is the likely reason.
* **Expert drop costs next to nothing**; in the paper it is the worst. A step holds one domain here and
  experts specialise by domain: the three least loaded ones have 0.6 % of the assignments. For the same
  reason skipping them takes nothing off the busiest.
* **Mixtral's speed-ups do not follow from its published routing.** 2.55x needs a layer whose busiest expert
  has 2.55 times the even share; the published counts have 1.08 to 1.34 in three layers of every domain, so
  that gamma = 1.5 or 2 never binds and gamma = 1 gives 1.34x at most. The paper's batches must have been
  more skewed ("under 3 N" is its own bound); the speed table has such routing, made up, as "stated peak".
* **Expanding can slow a layer down.** It fills a rank's own experts to C whether anyone asked for them or
  not. Where plain top-k is balanced already (Mixtral), that makes the busiest rank busier at any gamma
  above 1.

Beside EPLB: one redundant expert a device, placed for the load that then comes, evens out OLMoE's devices to
a few per cent and loses nothing; drop needs gamma = 1.5, and with it a fifth of the assignments, for the same
mean gain (1.50 against 1.52). Placed for other domains' load it can be worse than no placement; a limit needs
no history. Nothing keeps the two from being combined.

Limits: one model of 12.8 M parameters; perplexity, not tasks; first windows of documents, which differ from
the rest (json_factbook's are prose); short documents make small shards. Published routing is drawn token by
token, without the runs of a subject that text has, so real batches are probably more skewed; three layers of
each model."""
