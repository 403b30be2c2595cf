"""The parts of docs/results/speculative.md on published routing and the engine, and what is shared."""

from typing import Any

from shared.results import table

INSIDE, ACROSS = 0.30, 0.15  # the targets: fewer remote activations


def fewer(remote: float, baseline: float) -> float:
    """How much fewer, as a share of the baseline."""
    return 1 - remote / baseline


def met(value: float, target: float) -> str:
    return "met" if value >= target else "**missed**"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace("-0.0 ", "0.0 ")


def published_part(published: dict[str, Any]) -> list[str]:
    lines = [
        f"`{published['command']}` ({published['seconds'] / 60:.0f} minutes)",
        "",
        "OLMoE-1B-7B and Mixtral-8x7B from counts of (token id, expert) that OLMoE's authors published, "
        f"layers 0, 7 and 15, steps of {published['size']} independent tokens. Rows: where the statistics "
        "are from; in-domain the counts are parted at random, which is kinder than unseen text. "
        "An unseen id gets the average row: no embeddings were published to find its like. Means over "
        "layers.",
        "",
    ]
    for model, found in published["models"].items():
        methods, domains = found["methods"], found["domains"]
        chance = 1 - 1 / found["ranks"]
        rows, kinds = [], {"in-domain": [], "across": []}
        for name in domains:
            for other in domains:
                key = f"{name}>{other}"
                own, random = methods["alternating"][key], methods["random"][key]
                less = fewer(1 - own["local"], chance)
                kinds["in-domain" if name == other else "across"].append(less)
                rows.append([
                    name, other, percent(own["unseen"]), percent(own["local"]),
                    percent(methods["load"][key]["local"]), percent(random["local"]), percent(less),
                    percent(fewer(1 - own["local"], 1 - random["local"])),
                    f"{own['peak']:.2f}", f"{methods['load'][key]['peak']:.2f}", f"{random['peak']:.2f}",
                ])  # fmt: skip
        head = ["statistics", "test", "unseen ids", "`alternating`, local", "`load`", "`random`"]
        head += ["fewer remote", "than random with tables", "load", "of `load`", "of `random`"]
        sums = []
        for (kind, values), target in zip(kinds.items(), (INSIDE, ACROSS), strict=True):
            if values:
                mean = sum(values) / len(values)
                sums.append(
                    f"{kind} {percent(mean)} fewer remote activations in the mean, {met(mean, target)}"
                )
        lines += [
            f"{model}, {found['ranks']} devices, top {found['k']}:",
            "",
            *table(head, rows),
            f"Against {percent(chance)} remote by chance: {'; '.join(sums)}.",
            "",
        ]
    return lines


def engine_part(engine: dict[str, Any]) -> list[str]:
    rows, plain = [], engine["runs"]["plain"]["decode"]
    for name, row in engine["runs"].items():
        cells = [name, f"{row['same']} of {engine['sequences']}"]
        for phase in ("prefill", "decode"):
            one = row[phase]
            cells += [percent(one["remote"]), f"{one['useful_bytes'] / 1e6:.2f}", f"{one['bytes'] / 1e6:.2f}"]
        rows.append([*cells, f"{row['wall_seconds']:.1f}"])
    head = ["pipeline", "same tokens"]
    for phase in ("prefill", "decode"):
        head += [f"{phase}: remote", "useful MB", "sent MB"]
    differing = [n for n, row in engine["runs"].items() if row["same"] != engine["sequences"]]
    shuffled = engine["runs"]["shuffled"]["decode"]
    same = f"not by {', '.join(differing)}" if differing else "by every pipeline"
    return [
        f"`{engine['command']}` ({engine['seconds'] / 60:.0f} minutes)",
        "",
        f"The whole engine in float32 on {engine['groups'] * engine['ranks']} emulated devices: "
        f"{engine['groups']} data groups of {engine['ranks']} that share experts and attention heads, of "
        f"which the model has no more. Transport `ragged_all_to_all`; {engine['sequences']} sequences of "
        f"{engine['prompt']} tokens of all domains, {engine['new']} greedy tokens each. `plain`, `grouped` "
        "(experts renumbered, tokens dealt) and `shuffled` have attention tp; `dp` has whole requests on "
        "devices, in turn, and `requests` sends them where their experts are. Useful bytes are one row a "
        "(token, device) pair both ways, sent bytes one row a remote activation; the emulation itself sends "
        "more. Wall time is 8 devices on a few cores: a sanity check, no speed.",
        "",
        *table([*head, "wall, s"], rows),
        f"The tokens of `plain` were generated {same}. Shuffled decode has "
        f"{percent(fewer(shuffled['remote'], plain['remote']))} fewer remote activations than `plain` and "
        f"sends {percent(fewer(shuffled['bytes'], plain['bytes']))} fewer bytes in the exchange.",
        "",
    ]
