"""The parts of docs/results/speculative.md on moves of the residual, bytes and links."""

from typing import Any

from shared.results import table
from studies.speculative.report_runs import percent

ABLATIONS = (
    ("plain reduce-scatter + all-gather, no prediction, all in 2 bytes",
     "all-reduce, slice, all in 2 bytes", "unpredicted, all in 2 bytes"),
    ("prediction on top of it, all in 2 bytes", "unpredicted, all in 2 bytes", "shuffled, all in 2 bytes"),
    ("grouping alone in this engine", "plain", "grouped"),
    ("shuffling in this engine, the moved residual and all", "plain", "shuffled"),
    ("deduplication of plain", "plain", "plain, one row a pair"),
    ("deduplication of shuffled", "shuffled", "shuffled, one row a pair"),
    ("shuffling where both are deduplicated", "plain, one row a pair", "shuffled, one row a pair"),
    ("the same, all in 2 bytes", "unpredicted, pairs in 2 bytes", "shuffled, pairs in 2 bytes"),
)  # fmt: skip
MODELS = {
    "tiny": "the bundled model",
    "large": "an illustration: the same local rates, pairs as if remote experts fell on devices by chance",
}


def moves_part(found: dict[str, Any]) -> list[str]:
    rows = [
        [f"{ranks}, {size}", *map(percent, (row["first"], row["between"], row["home"])), f"{row['rows']:.2f}"]
        for ranks, sizes in found["devices"].items()
        for size, row in sizes.items()
    ]
    return [
        f"`{found['command']}` ({found['seconds'] / 60:.0f} minutes)",
        "",
        "Shuffled, a token's float32 residual stays where its experts ran, and is sent only where the next "
        "layer's order has the token on another device. Shares of tokens so moved, `alternating`'s placement "
        "with tables of token ids, in-domain, as above; into the first layer and behind the last the other "
        "order is that of the batch. Rows: all moves over tokens and layers, of which this model has few: "
        "the two ends weigh less in a deeper one.",
        "",
        *table(["devices, tokens", "into the first", "between layers", "home", "rows a layer"], rows),
    ]


def bytes_part(found: dict[str, Any]) -> list[str]:
    lines = [
        f"`{found['command']}`",
        "",
        "Arithmetic, nothing is measured here but the rates (`alternating` and random placements, steps of "
        "256, and the moves, above). Bytes a device sends in one layer's attention and experts, over the "
        "step's tokens. This engine: bfloat16 rows gathered before attention, float32 partial sums "
        "reduce-scattered behind it, the exchange bfloat16 out and float32 back. `plain` has random "
        "placements; `grouped` deals its tokens too; `shuffled` also moves the float32 residual of tokens "
        "that change devices. `one row a pair` is a deduplicated exchange, which the engine does not have. "
        "`replicated transport` is the engine's default. The all-reduce pipelines and those in 2 bytes are "
        "other engines': the latter is the paper's accounting, and `unpredicted` is there what `plain` is "
        "here. The ragged exchange also sends its counts, E integers a device in one more small collective, "
        "not counted.",
        "",
    ]
    for model, what in MODELS.items():
        shapes = {n.split("/")[1]: s for n, s in found["shapes"].items() if n.startswith(model)}
        one = next(iter(shapes.values()))
        head = ["pipeline", "collectives"]
        for ranks in shapes:
            head += [f"{ranks} devices", "against plain"]
        rows = []
        for key, row in one["rows"].items():
            cells = [key, str(row["collectives"])]
            for shape in shapes.values():
                cells += [f"{shape['rows'][key]['bytes']:.0f}", f"{change(shape, 'plain', key):+.1%}"]
            rows.append(cells)
        lines += [f"Bytes a token, {what}, k = {one['k']}, D = {one['width']}:", "", *table(head, rows)]
    lines += ["![bytes of a layer](speculative_bytes.svg)", ""]
    return [*lines, *ablations(found), *times(found)]


def change(shape: dict[str, Any], before: str, after: str) -> float:
    return shape["rows"][after]["bytes"] / shape["rows"][before]["bytes"] - 1


def ablations(found: dict[str, Any]) -> list[str]:
    shapes = found["shapes"]
    rows = [
        [title, *(f"{change(shape, before, after):+.1%}" for shape in shapes.values())]
        for title, before, after in ABLATIONS
    ]
    verdicts = []
    for name, shape in shapes.items():
        own, paper = change(shape, "plain", "shuffled"), ABLATIONS[1]
        word = "costs" if own > 0 else "saves"
        two = change(shape, *paper[1:])
        verdicts.append(
            f"* {name.replace('/', ' shape, ')} devices: shuffling {word} {abs(own):.1%} of plain's bytes in "
            f"this engine; with 2-byte rows throughout prediction would save {-two:.1%}."
        )
    return [
        "Each step alone, change of bytes:",
        "",
        *table(["step", *(name.replace("/", ", ") for name in shapes)], rows),
        *verdicts,
        "",
        "Shuffling pays where what stays local, k x (local rate gained) x 6 bytes a number, is over what "
        "moves, (rows a layer) x 4 bytes: the more experts a token has, the sooner. With more devices both "
        "shrink beside the rows that attention gathers and scatters, (G - 1) / G of all on each device.",
        "",
    ]


def times(found: dict[str, Any]) -> list[str]:
    links = found["links"]
    stated = "; ".join(f"{n} {b / 1e9:g} GB/s, {1e6 * s:g} us" for n, (b, s) in links.items())
    lines = [
        f"Time of a layer's collectives: latency of each + bytes / bandwidth. One way out of a device, and "
        f"what a collective costs at least: {stated}. The bandwidths are nominal (ICI: one axis of the "
        "torus, both ways), the latencies assumed; no overlap with computing.",
        "",
    ]
    shape = found["shapes"]["large/8"]
    head = ["us, large shape, 8 devices"]
    head += [f"{link}, {tokens}" for link in links for tokens in found["steps"]]
    rows = [
        [key, *(f"{row['us'][str(tokens)][link]:.0f}" for link in links for tokens in found["steps"])]
        for key, row in shape["rows"].items()
    ]
    small = [max(shape["rows"], key=lambda key: -shape["rows"][key]["us"]["64"][link]) for link in links]
    large = [max(shape["rows"], key=lambda key: -shape["rows"][key]["us"]["4096"][link]) for link in links]
    best = "; ".join(f"{n}: {a} / {b}" for n, a, b in zip(links, small, large, strict=True))
    own, plain = shape["rows"]["shuffled"]["us"], shape["rows"]["plain"]["us"]
    against = [
        f"{link} {' / '.join(f'{own[size][link] / plain[size][link] - 1:+.0%}' for size in own)}"
        for link in links
    ]
    return [
        *lines,
        *table(head, rows),
        f"Shortest at 64 / 4096 tokens: {best}.",
        "",
        f"`shuffled` against `plain` at 64 / 4096 tokens: {', '.join(against)}. Its fifth collective is "
        "counted in full, though the move may run beside attention: it waits for the order alone.",
        "",
    ]
