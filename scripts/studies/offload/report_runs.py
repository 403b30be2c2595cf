"""The parts of docs/results/offload.md that ran an engine."""

from typing import Any

from shared.results import table


def large_part(part: dict[str, Any]) -> list[str]:
    runs = part["runs"]
    names = list(next(iter(runs.values())))
    head = [
        "comparator",
        *(f"batch {key.partition('/')[0]}, {float(key.partition('/')[2]):.0%}" for key in runs),
    ]
    rows = ([f"`{name}`", *(cell(runs[key][name]) for key in runs)] for name in names)
    engine = part["engine"]
    return [
        "## A random model of 0.9 billion parameters",
        "",
        f"`{part['command']}` ({part['seconds'] / 60:.0f} minutes)",
        "",
        f"`{part['sizes']}`: 64 experts a layer, top 8, gates scaled to logits of deviation 1, tokens by "
        "Zipf's law. Nothing was learned, so hits come from a token's own experts and from a residual stream "
        "that one layer changes little. In the simulator, hit / TPOT:",
        "",
        *table(head, rows),
        "The engine at batch 1, greedy, milliseconds a token with the prompt (three runs, median):",
        "",
        *table(
            ["", "ms", "hit", "MB a step", "tokens as resident"],
            (
                [
                    f"`{name}`",
                    f"{r['ms']:.1f}",
                    f"{r['hit']:.1%}",
                    f"{r['bytes_step'] / 1e6:.0f}",
                    yes(r["same"]),
                ]
                for name, r in engine.items()
            ),
        ),
    ]


def cell(figures: dict[str, float]) -> str:
    return f"{figures['hit']:.1%} / {figures['tpot']:.0f}"


def yes(value: object) -> str:
    return "yes" if value else "**no**"


def engine_part(part: dict[str, Any]) -> list[str]:
    lines = [
        "## The engine",
        "",
        f"`{part['command']}` ({part['seconds'] / 60:.0f} minutes)",
        "",
        f"The bundled model in float32, {part['requests']} questions of MT-bench cut to {part['prompt']} "
        f"tokens, {part['new']} new ones each, greedy. `alike`: sequences with exactly the tokens of the "
        "engine that has all experts on the device. On this CPU a copy is a copy in memory and nothing runs "
        "beside it: seconds say what copies and bookkeeping cost, not what overlap saves.",
        "",
    ]
    if any(name.endswith(" oracle belady") for runs in part["runs"].values() for name in runs):
        lines += [
            "`oracle belady` is told, step by step, what the resident engine needed; its seconds include "
            "compiling once more.",
            "",
        ]
    for batch, runs in part["runs"].items():
        rows = []
        for name, run in runs.items():
            share, _, pair = name.partition(" ")
            resident = name == "resident"
            rows.append(
                [
                    "resident" if resident else f"`{pair}`", "100 %" if resident else f"{float(share):.0%}",
                    f"{run['pool_bytes'] / 2**20:.1f}",
                    hit(run["prefill"], resident), hit(run["decode"], resident),
                    f"{run['decode']['bytes_step'] / 2**20:.2f}", f"{run['seconds']:.2f}",
                    f"{run['same']} of {part['requests']}",
                ]
            )  # fmt: skip
        head = ["predictor, eviction", "experts", "pool, MiB", "hit, prompts", "hit, decode"]
        head += ["MiB a decode step", "seconds", "alike"]
        lines += [f"Batch {batch}:", "", *table(head, rows)]
    return [*lines, *arrivals_part(part["arrivals"])]


def hit(phase: dict[str, Any], resident: bool) -> str:
    return "-" if resident else f"{phase['hit']:.1%}"


def arrivals_part(found: dict[str, Any]) -> list[str]:
    rows = (
        [
            f"`{name}`" if name != "resident" else name, f"{run['ttft_ms']:.1f}", f"{run['tpot_ms']:.2f}",
            hit(run["decode"], name == "resident"), f"{run['decode']['bytes_step'] / 2**20:.2f}",
            f"{run['same']} of {found['requests']}",
        ]
        for name, run in found["runs"].items()
    )  # fmt: skip
    return [
        "### Requests as they come",
        "",
        f"The first {found['requests']} requests of the Azure conversation trace, lengths divided by "
        f"{found['shorter']}, its seconds times {found['slower']:g}, text of the valid split; up to 16 at "
        "once, a quarter of all experts on the device. Median milliseconds, which on two cores vary "
        "several-fold with whatever else runs; hits, bytes and tokens do not.",
        "",
        *table(
            ["predictor, eviction", "TTFT", "TPOT", "hit, decode", "MiB a decode step", "alike"], rows
        ),
    ]  # fmt: skip
