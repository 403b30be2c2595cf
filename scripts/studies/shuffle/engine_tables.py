"""Makes the tables of docs/results/shuffle.md on the engine."""

from typing import Any

from shared.results import percent, table


def engine(engine: dict[str, Any]) -> str:
    """Returns the table of the engine's runs. It has a row for each pipeline."""
    rows = []
    for name, row in engine["runs"].items():
        cells = [name, f"{row['same']} of {engine['sequences']}"]
        for phase in ("prefill", "decode"):
            one = row[phase]
            cells += [percent(one["remote"]), f"{one['useful_bytes'] / 1e6:.2f}", f"{one['bytes'] / 1e6:.2f}"]
        rows.append([*cells, f"{row['wall_seconds']:.1f}"])
    head = ["pipeline", "same tokens"]
    for phase in ("prefill", "decode"):
        head += [f"{phase}: remote", "useful MB", "sent MB"]
    return table([*head, "wall, s"], rows)


def differing(engine: dict[str, Any]) -> list[str]:
    """Returns the pipelines that did not generate plain's tokens."""
    return [name for name, row in engine["runs"].items() if row["same"] != engine["sequences"]]
