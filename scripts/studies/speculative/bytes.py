"""What a rank sends in one layer under every pipeline, by arithmetic on measured rates, and its time.

Ring collectives: of N whole rows over G ranks, an all-gather and a reduce-scatter send (G - 1) / G of N rows
from each rank, an all-reduce twice that; the exchange sends what is remote once each way, N / G tokens a
rank; a shuffled residual sends the rows that change ranks. Bytes are those a rank sends, over the tokens of
the step.
"""

from dataclasses import dataclass
from typing import Any

HALF, FULL = 2, 4  # bytes of a bfloat16 and of a float32 number
STEPS = (64, 4096)  # tokens of a step
# one way out of a device, bytes a second, and seconds that each collective costs at least; both assumed
LINKS = {
    "ICI v5e": (90e9, 5e-6),
    "NVLink 4": (450e9, 10e-6),
    "PCIe 4 x16": (31.5e9, 20e-6),
    "200 GbE": (25e9, 30e-6),
}


@dataclass(frozen=True)
class Pipeline:
    """A layer's collectives: whole rows that are gathered or scattered, and the exchange.

    row_bytes: bytes of a number in each gather or scatter of whole rows.
    exchange: the measured case whose rate the exchange has; None if no token is exchanged.
    has_pair_rows: whether one row is sent for each remote (token, rank) pair, not for each remote activation.
    request_bytes: bytes of a number that is sent to an expert.
    reply_bytes: bytes of a number that comes back.
    move_bytes: bytes of a number of the residual of a token that changes ranks; 0 if none does.
    num_reduces: all-reduces, of one collective and two entries of ``row_bytes`` each.
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
        """Bytes a rank sends for each token of the step."""
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
    """Measured rates of the three cases at one count of devices; moved: rows of the residual, a layer."""
    best = figures["alternating"]["steps"][size]
    return {
        "random": figures["random"]["steps"][size]["dealt"],
        "grouped": best["dealt"],
        "shuffled": best["tables"] | {"moved": moves[size]["rows"]},
    }


def widened(rates: dict[str, dict[str, float]], wider: int, ranks: int) -> dict[str, Any]:
    """The same local and moved rates at another top k; pairs by chance: the remote activations of a token
    fall on the other ranks independently."""
    return {
        name: rate
        | {
            "pairs": (ranks - 1) * (1 - (1 - (1 - rate["local"]) / (ranks - 1)) ** wider),
        }
        for name, rate in rates.items()
    }


def measure(grouping: dict[str, Any], moves: dict[str, Any]) -> dict[str, Any]:
    """The ``bytes`` part: shape -> pipeline -> bytes, collectives and microseconds."""
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
