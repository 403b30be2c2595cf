"""Makes the tables of docs/results/offload.md for the parts that ran an engine."""

from typing import Any

from shared.results import table


def simulated(runs: dict[str, Any]) -> str:
    """Returns the random model's table: a row is a comparator, a column is a batch size and a budget."""
    names = list(next(iter(runs.values())))
    keys = [key.partition("/") for key in runs]
    head = ["comparator", *(f"batch {batch}, {float(share):.0%}" for batch, _, share in keys)]
    rows = (
        [f"`{name}`", *(f"{run[name]['hit']:.1%} / {run[name]['tpot']:.0f}" for run in runs.values())]
        for name in names
    )
    return table(head, rows)


def timed(engine: dict[str, Any]) -> str:
    """Returns the random model's table, which has a row for each run of the engine."""
    rows = (
        [
            f"`{name}`", f"{r['ms']:.1f}", f"{r['hit']:.1%}", f"{r['bytes_step'] / 1e6:.0f}",
            "yes" if r["same"] else "**no**",
        ]
        for name, r in engine.items()
    )  # fmt: skip
    return table(["", "ms", "hit", "MB a step", "tokens as resident"], rows)


def has_oracle(engine: dict[str, Any]) -> bool:
    """Returns whether an oracle ran."""
    return any(name.endswith(" oracle belady") for runs in engine["runs"].values() for name in runs)


def runs(engine: dict[str, Any], batch: str) -> str:
    """Returns a batch size's table, which has a row for each predictor, eviction and budget."""
    rows = []
    for name, run in engine["runs"][batch].items():
        share, _, pair = name.partition(" ")
        resident = name == "resident"
        rows.append([
            "resident" if resident else f"`{pair}`", "100 %" if resident else f"{float(share):.0%}",
            f"{run['pool_bytes'] / 2**20:.1f}",
            hit(run["prefill"], resident), hit(run["decode"], resident),
            f"{run['decode']['bytes_step'] / 2**20:.2f}", f"{run['seconds']:.2f}",
            f"{run['same']} of {engine['requests']}",
        ])  # fmt: skip
    head = ["predictor, eviction", "experts", "pool, MiB", "hit, prompts", "hit, decode"]
    return table([*head, "MiB a decode step", "seconds", "alike"], rows)


def hit(phase: dict[str, Any], resident: bool) -> str:
    return "-" if resident else f"{phase['hit']:.1%}"


def arrivals(figures: dict[str, Any]) -> str:
    """Returns the table of the requests with arrival times. It has a row for each predictor and eviction."""
    rows = (
        [
            f"`{name}`" if name != "resident" else name, f"{run['ttft_ms']:.1f}", f"{run['tpot_ms']:.2f}",
            hit(run["decode"], name == "resident"), f"{run['decode']['bytes_step'] / 2**20:.2f}",
            f"{run['same']} of {figures['requests']}",
        ]
        for name, run in figures["runs"].items()
    )  # fmt: skip
    return table(["predictor, eviction", "TTFT", "TPOT", "hit, decode", "MiB a decode step", "alike"], rows)


def quantised_forms(quantised: dict[str, Any]) -> str:
    """Returns the table of the forms of experts, which has a row for each form."""
    memories = list(next(iter(quantised["forms"].values()))["slots"])
    rows = (
        [
            form, f"{f['expert_bytes'] / 2**10:.1f}",
            *(f"{f['slots'][memory]} of {f['experts']}" for memory in memories),
            f"{f['perplexity']:.3f}", f"{f['nll'] - quantised['forms']['bfloat16']['nll']:+.4f}",
        ]
        for form, f in quantised["forms"].items()
    )  # fmt: skip
    head = ["experts", "KiB each", *(f"slots of {spaced(memory)}" for memory in memories)]
    return table([*head, "perplexity", "nats a token"], rows)


def quantised_runs(quantised: dict[str, Any], batch: str) -> str:
    """Returns a batch size's table, which has a row for each form and a column for each memory."""
    runs = {
        key.partition("/")[2]: rows
        for key, rows in quantised["runs"].items()
        if key.partition("/")[0] == batch
    }
    rows = (
        [form, *(f"{run[form]['hit']:.1%} / {run[form]['bytes_step'] / 2**20:.3f}" for run in runs.values())]
        for form in quantised["forms"]
    )
    return table(["experts", *map(spaced, runs)], rows)


def quantised_speed(speed: dict[str, Any]) -> str:
    """Returns the table of times, which has a row for each form and a column for each memory."""
    forms = next(iter(speed["runs"].values()))
    rows = ([form, *(f"{run[form]:.2f}" for run in speed["runs"].values())] for form in forms)
    return table(["experts", *map(spaced, speed["runs"])], rows)


def spaced(memory: str) -> str:
    return memory.replace("MiB", " MiB")


def pool_gain(quantised: dict[str, Any], form: str) -> float:
    """Returns how many experts of a form have the bytes of one in bfloat16."""
    forms = quantised["forms"]
    return forms["bfloat16"]["expert_bytes"] / forms[form]["expert_bytes"]


def loss_spread(quantised: dict[str, Any]) -> float:
    """Returns the largest difference of a form's loss, nats a token, between pools of one batch size."""
    losses: dict[tuple[str, str], list[float]] = {}
    for key, rows in quantised["runs"].items():
        for form, run in rows.items():
            losses.setdefault((key.partition("/")[0], form), []).append(run["nll"])
    return max(max(each) - min(each) for each in losses.values())
