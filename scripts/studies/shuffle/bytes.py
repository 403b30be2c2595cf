"""Computes what a rank sends in one layer under every pipeline, from measured rates, and how long that takes.

The collectives are rings: for N whole rows over G ranks, an all-gather and a reduce-scatter send (G - 1) / G
of N rows from each rank, and an all-reduce sends twice that. The exchange sends what is remote once each way,
with N / G tokens per rank. A shuffled residual sends the rows that change ranks. Bytes are those that a rank
sends, divided by the tokens of the step.
"""

from dataclasses import dataclass
from typing import Any

HALF, FULL = 2, 4  # bytes of a bfloat16 and of a float32 number
STEPS = (64, 4096)  # tokens in a step
# Each link's bytes per second one way out of a device, and the least seconds of a collective; both assumed.
LINKS = {
    "ICI v5e": (90e9, 5e-6),
    "NVLink 4": (450e9, 10e-6),
    "PCIe 4 x16": (31.5e9, 20e-6),
    "200 GbE": (25e9, 30e-6),
}


@dataclass(frozen=True)
class Pipeline:
    """The collectives of a layer: gathers and scatters of whole rows, and the exchange.

    row_bytes: bytes of a number in each gather or scatter of whole rows.
    exchange: measured case whose rate the exchange has; None if no token is exchanged.
    has_pair_rows: whether one row is sent for each remote (token, rank) pair, not for each remote activation.
    request_bytes: bytes of a number that is sent to an expert.
    reply_bytes: bytes of a number that comes back.
    move_bytes: bytes of a number in the residual of a token that changes ranks; 0 if no token does.
    num_reduces: number of all-reduces; each is one collective with two entries in ``row_bytes``.
    """

    row_bytes: tuple[int, ...]
    exchange: str | None = None
    has_pair_rows: bool = False
    request_bytes: int = HALF
    reply_bytes: int = FULL
    move_bytes: int = 0
    num_reduces: int = 0

    @property
    def collectives(self) -> int:
        num_exchanges = 2 if self.exchange else 0
        num_moves = 1 if self.move_bytes else 0
        return len(self.row_bytes) - self.num_reduces + num_exchanges + num_moves

    def sent(self, rates: dict[str, dict[str, float]], width: int, k: int, ranks: int) -> float:
        """Returns the bytes that a rank sends for each token of the step."""
        total = sum(self.row_bytes) * width * (ranks - 1) / ranks
        if self.exchange:
            rate = rates[self.exchange]
            rows = rate["pairs"] if self.has_pair_rows else k * (1 - rate["local"])
            total += rows / ranks * width * (self.request_bytes + self.reply_bytes)
            total += rate["moved"] / ranks * width * self.move_bytes if self.move_bytes else 0
        return total


PLAIN = (HALF, FULL)  # all-gather of normed rows, reduce-scatter of partial sums
PIPELINES = {
    "plain": Pipeline(PLAIN, "random"),
    "grouped": Pipeline(PLAIN, "grouped"),
    "shuffled": Pipeline(PLAIN, "shuffled", move_bytes=FULL),
    "plain, one row a pair": Pipeline(PLAIN, "random", has_pair_rows=True),
    "grouped, one row a pair": Pipeline(PLAIN, "grouped", has_pair_rows=True),
    "shuffled, one row a pair": Pipeline(PLAIN, "shuffled", has_pair_rows=True, move_bytes=FULL),
    "replicated transport": Pipeline((*PLAIN, *PLAIN)),
    "all-reduce, slice": Pipeline((FULL, FULL, FULL), "random", num_reduces=1),
    "all-reduce, replicated tokens": Pipeline((FULL, FULL, FULL, FULL), num_reduces=2),
    "all-reduce, slice, all in 2 bytes": Pipeline(
        (HALF, HALF, HALF), "random", reply_bytes=HALF, num_reduces=1
    ),
    "shuffled, all in 2 bytes": Pipeline((HALF, HALF), "shuffled", reply_bytes=HALF),
    "unpredicted, all in 2 bytes": Pipeline((HALF, HALF), "random", reply_bytes=HALF),
    "shuffled, pairs in 2 bytes": Pipeline((HALF, HALF), "shuffled", has_pair_rows=True, reply_bytes=HALF),
    "unpredicted, pairs in 2 bytes": Pipeline((HALF, HALF), "random", has_pair_rows=True, reply_bytes=HALF),
}


def seconds(num_bytes: float, num_collectives: int, tokens: int, link: str) -> float:
    bandwidth, latency = LINKS[link]
    return num_collectives * latency + tokens * num_bytes / bandwidth


def rates_of(
    figures: dict[str, Any], moves: dict[str, Any], size: str = "256"
) -> dict[str, dict[str, float]]:
    """Returns the measured rates of the three cases at one number of devices.

    ``moved`` is the number of residual rows that move in a layer, for each token.
    """
    best = figures["alternating"]["steps"][size]
    return {
        "random": figures["random"]["steps"][size]["dealt"],
        "grouped": best["dealt"],
        "shuffled": best["tables"] | {"moved": moves[size]["rows"]},
    }


def widened(rates: dict[str, dict[str, float]], wider: int, ranks: int) -> dict[str, Any]:
    """Returns the same local and moved rates at another top k, with new pairs.

    The pairs are those of chance: a token's remote activations go to the other ranks independently.
    """
    return {
        name: rate
        | {
            "pairs": (ranks - 1) * (1 - (1 - (1 - rate["local"]) / (ranks - 1)) ** wider),
        }
        for name, rate in rates.items()
    }


def measure(grouping: dict[str, Any], moves: dict[str, Any]) -> dict[str, Any]:
    """Returns the ``bytes`` part of the results by shape and pipeline: bytes, collectives, microseconds."""
    k, width = grouping["sizes"]["k"], grouping["width"]
    found: dict[str, Any] = {}
    for ranks in (4, 8, 16):
        rates = rates_of(grouping["in_domain"][str(ranks)], moves["devices"][str(ranks)])
        found[f"tiny/{ranks}"] = shape(rates, width, k, ranks)
        found[f"large/{ranks}"] = shape(widened(rates, 8, ranks), 2048, 8, ranks)
    return {"links": LINKS, "steps": list(STEPS), "shapes": found}


def shape(rates: dict[str, dict[str, float]], width: int, k: int, ranks: int) -> dict[str, Any]:
    rows = {}
    for name, pipeline in PIPELINES.items():
        sent, count = pipeline.sent(rates, width, k, ranks), pipeline.collectives
        times = {
            str(tokens): {link: round(1e6 * seconds(sent, count, tokens, link), 2) for link in LINKS}
            for tokens in STEPS
        }
        rows[name] = {"bytes": round(sent, 1), "collectives": count, "us": times}
    return {"width": width, "k": k, "rates": rates, "rows": rows}
