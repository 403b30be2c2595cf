"""docs/results/offload.md from the measured figures alone."""

from collections.abc import Iterable
from typing import Any

from shared.results import table
from studies.offload.report_runs import engine_part, large_part
from studies.offload.simulate import BASELINES, VARIED

MAIN = "1/0.25"
SHORT = ("LRU", "LFU", "request counts, LRU", "fMoE", "expert maps, online", "token table", "next gate",
         "default", "oracle")  # fmt: skip
HIT, TPOT = 0.15, 0.20  # the targets


def document(results: dict[str, Any]) -> str:
    lines = [*INTRODUCTION]
    for part, write in (
        ("simulate", simulate_part),
        ("mt_bench", mt_bench_part),
        ("sensitivity", sensitivity_part),
        ("large", large_part),
        ("engine", engine_part),
    ):
        if part in results:
            lines += write(results[part])
    return "\n".join([*lines, *OBJECTIONS]).rstrip() + "\n"


INTRODUCTION = [
    "# fMoE: expert offload with a fixed device pool",
    "",
    "How often the experts that a step needs are on the device already when only some of all experts fit, "
    "and what the rest costs, beside the paper (Yu et al., arXiv 2502.05370). Offload is lossless. Each part "
    "names its command; all figures are in `offload.json`, and `python scripts/bench_offload.py --parts` "
    "makes text and plots (the `plots` extra) from it alone.",
    "",
    "**Counted** is an expert once a layer and step, however many tokens it has. A *hit* was needed and its "
    "copy had ended when it was needed; *late* ones were still on their way. *Copies* are experts from host "
    "to device, prefetches among them whether they were used or not; *useful* is the share of prefetched "
    "experts that was needed before it gave way.",
    "",
    "**The simulator** takes the executor's own decisions (the same functions; a test compares hits and "
    "copies of both exactly) on routing traces, and adds a clock: a decode layer computes for 1, one "
    "expert's copy takes 1, the link works beside compute and in order, a layer of a prompt computes for 4. "
    "TPOT and TTFT are in these units. No real link is claimed by them.",
    "",
    "Comparators differ in predictor and eviction only. `LRU`, `LFU`: no prefetch. `request counts`: "
    "MoE-Infinity's, the stored request most like this one. `fMoE`: expert maps with the paper's eviction, "
    "1,000 iterations from the profile. `next gate`: the next layers' routers on this layer's input. "
    "`default`: that, and the token table before the first layer. Those without an eviction in their name "
    "evict by expected use (`jmoe/offload/policy.py`, whose one constant was chosen on the train split). "
    "`oracle`: Belady's eviction, a perfect forecast.",
    "",
]


def simulate_part(part: dict[str, Any]) -> list[str]:
    main = part["runs"][MAIN]
    return [
        "## Comparators in the simulator",
        "",
        f"`{part['command']}` ({part['seconds'] / 60:.0f} minutes, deterministic)",
        "",
        f"The bundled model: {part['layers']} layers of {part['experts']} experts, top {part['k']}; profile "
        f"of {part['profile_tokens']} tokens of the train split, {part['iterations']} iterations kept. "
        f"Tested on {part['windows']} windows of the valid split, 13 domains in turn, a prompt of "
        f"{part['prompt']} tokens and {part['new']} decode steps with the text's own tokens; the cache goes "
        "on from one to the next.",
        "",
        "A quarter of all experts on the device, batch 1:",
        "",
        *table(HEAD, (row(name, figures) for name, figures in main.items())),
        *verdicts(main),
        "",
        "![hit rate and time by budget](offload_budget.svg)",
        "",
        *grids(part["runs"]),
    ]


HEAD = ("comparator", "hit", "late", "copies a step", "useful", "TPOT", "TTFT")


def row(name: str, figures: dict[str, float]) -> list[str]:
    useful = percent(figures["useful"]) if figures["prefetched"] else "-"
    return [
        f"`{name}`", percent(figures["hit"]), percent(figures["late"]), f"{figures['copies']:.2f}", useful,
        f"{figures['tpot']:.2f}", f"{figures['ttft']:.1f}",
    ]  # fmt: skip


def verdicts(main: dict[str, dict[str, float]]) -> list[str]:
    """Against the best of the baselines, in hits and in time."""
    hit = max(main[name]["hit"] for name in BASELINES)
    tpot = min(main[name]["tpot"] for name in BASELINES)
    lines = [f"Against the best baseline (hit {percent(hit)}, TPOT {tpot:.2f}):", ""]
    for name in ("default", "next gate", "token table", "expert maps, online", "fMoE"):
        more, less = main[name]["hit"] / hit - 1, 1 - main[name]["tpot"] / tpot
        lines.append(
            f"* `{name}`: {more:+.1%} hits, target {HIT:+.0%} {met(more >= HIT)}; {-less:+.1%} TPOT, target "
            f"{-TPOT:+.0%} {met(less >= TPOT)}."
        )
    return lines


def met(is_met: bool) -> str:
    return "met" if is_met else "**missed**"


def grids(runs: dict[str, Any]) -> list[str]:
    """Hits and time of every batch by budget."""
    lines: list[str] = []
    for batch in dict.fromkeys(key.partition("/")[0] for key in runs):
        shares = [key.partition("/")[2] for key in runs if key.startswith(f"{batch}/")]
        head = ["comparator", *(f"{float(s):.0%}" for s in shares)]
        needed = runs[f"{batch}/{shares[0]}"]["LRU"]["needed"]

        def cell(name: str, share: str, batch: str = batch) -> str:
            figures = runs[f"{batch}/{share}"][name]
            return f"{percent(figures['hit'])} / {figures['tpot']:.1f}"

        rows = ([f"`{name}`", *(cell(name, share) for share in shares)] for name in SHORT)
        lines += [
            f"Batch {batch}, {needed:.0f} experts needed a step: hit / TPOT by the share of experts on the "
            "device:",
            "",
            *table(head, rows),
        ]
    return lines


def mt_bench_part(part: dict[str, Any]) -> list[str]:
    main = part["runs"][MAIN]
    return [
        "## MT-bench's questions",
        "",
        f"`{part['command']}` ({part['seconds'] / 60:.0f} minutes)",
        "",
        f"{part['windows']} questions, cut to or repeated up to {part['prompt']} tokens, and the bundled "
        f"model's own greedy answers of {part['new']}; a quarter of all experts, batch 1.",
        "",
        *table(HEAD, (row(name, figures) for name, figures in main.items())),
        *verdicts(main),
        "",
    ]


def sensitivity_part(part: dict[str, Any]) -> list[str]:
    names = VARIED

    def cells(figures: dict[str, Any]) -> Iterable[str]:
        return (f"{percent(figures[name]['hit'])} / {figures[name]['tpot']:.1f}" for name in names)

    rows = ([what, *cells(figures)] for what, figures in part["runs"].items())
    return [
        "## One parameter at a time",
        "",
        f"`{part['command']}` ({part['seconds'] / 60:.0f} minutes)",
        "",
        f"As above, batch 1, {part['slots']} slots: hit / TPOT. Elsewhere a copy takes 1, a layer may begin "
        "one prefetch, forecasts reach 3 layers, a store holds 1000 iterations.",
        "",
        *table(["", *(f"`{name}`" for name in names)], rows),
    ]


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


OBJECTIONS = [
    "## Four objections",
    "",
    "Why other engines refuse expert offload, and what this one does.",
    "",
    "* *It is invasive: every layer has to stop for the host.* The table, the forecast and the choice of "
    "victims are small arrays inside the jitted step, and a copy is one `device_put` of a slice of the host "
    "stack; the layer knows no more than an `ExpertSource`.",
    "* *It does not help prefill.* It does not pretend to: a prompt fires nearly all experts, so what is in "
    "the pool runs from there and the rest streams, each expert once a layer and run; it evicts nothing.",
    "* *It is useless at concurrency 32.* At batch 16 most experts of a layer are needed in every step, "
    "and a pool can spare no more than its own share of the copies: in the table above the default comes "
    "near the oracle, and LRU, up to half of all experts, spares next to none. With 10 % of them nothing "
    "helps. `[moe.binning]` with `resident_bonus` needs fewer experts; it is lossy, and counts what it does.",
    "* *It needs eager mode.* It is compiled whole; for a TPU the prefetch becomes an asynchronous slice "
    'copy around the experts\' kernel (`tests/offload/test_offload_aot.py`). `executor = "host"` drives the '
    "layers from the host instead, with the same decisions.",
]
