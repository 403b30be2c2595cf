"""Makes the tables of docs/results/shuffle.md on moves of the residual, bytes and links."""

from typing import Any

from shared.results import percent, table

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


def moves(figures: dict[str, Any]) -> str:
    """Returns the table, which has a row for each number of devices and of tokens."""
    rows = [
        [f"{ranks}, {size}", *map(percent, (row["first"], row["between"], row["home"])), f"{row['rows']:.2f}"]
        for ranks, sizes in figures["devices"].items()
        for size, row in sizes.items()
    ]
    return table(["devices, tokens", "into the first", "between layers", "home", "rows a layer"], rows)


def shapes_of(figures: dict[str, Any], model: str) -> dict[str, Any]:
    """Returns the model's shapes by number of devices."""
    return {n.split("/")[1]: shape for n, shape in figures["shapes"].items() if n.startswith(model)}


def pipelines(shapes: dict[str, Any]) -> str:
    """Returns the table of a token's bytes. It has a row for each pipeline."""
    head = ["pipeline", "collectives"]
    for ranks in shapes:
        head += [f"{ranks} devices", "against plain"]
    rows = []
    for key, row in next(iter(shapes.values()))["rows"].items():
        cells = [key, str(row["collectives"])]
        for shape in shapes.values():
            cells += [f"{shape['rows'][key]['bytes']:.0f}", f"{change(shape, 'plain', key):+.1%}"]
        rows.append(cells)
    return table(head, rows)


def change(shape: dict[str, Any], first: str, second: str) -> float:
    return shape["rows"][second]["bytes"] / shape["rows"][first]["bytes"] - 1


def predicted(shape: dict[str, Any]) -> float:
    """Returns the change of bytes by prediction if all rows have 2 bytes a number."""
    return change(shape, *ABLATIONS[1][1:])


def ablations(shapes: dict[str, Any]) -> str:
    """Returns the table of the changes of bytes. It has a row for each step."""
    rows = [
        [title, *(f"{change(shape, before, after):+.1%}" for shape in shapes.values())]
        for title, before, after in ABLATIONS
    ]
    return table(["step", *(name.replace("/", ", ") for name in shapes)], rows)


def links(figures: dict[str, Any]) -> str:
    return "; ".join(f"{n} {b / 1e9:g} GB/s, {1e6 * s:g} us" for n, (b, s) in figures["links"].items())


def times(figures: dict[str, Any], shape: dict[str, Any]) -> str:
    """Returns the table of microseconds by link and tokens. It has a row for each pipeline."""
    columns = [(link, tokens) for link in figures["links"] for tokens in figures["steps"]]
    rows = [
        [key, *(f"{row['us'][str(tokens)][link]:.0f}" for link, tokens in columns)]
        for key, row in shape["rows"].items()
    ]
    return table(["us, large shape, 8 devices", *(f"{link}, {tokens}" for link, tokens in columns)], rows)


def shortest(figures: dict[str, Any], shape: dict[str, Any]) -> str:
    """Returns the fastest pipelines with the fewest and with the most tokens, by link."""

    def best(link: str, tokens: str) -> str:
        return min(shape["rows"], key=lambda key: shape["rows"][key]["us"][tokens][link])

    return "; ".join(f"{link}: {best(link, '64')} / {best(link, '4096')}" for link in figures["links"])


def against_plain(figures: dict[str, Any], shape: dict[str, Any]) -> str:
    """Returns by how much the time of "shuffled" differs from plain's, by link."""
    own, plain = shape["rows"]["shuffled"]["us"], shape["rows"]["plain"]["us"]
    return ", ".join(
        f"{link} {' / '.join(f'{own[size][link] / plain[size][link] - 1:+.0%}' for size in own)}"
        for link in figures["links"]
    )
