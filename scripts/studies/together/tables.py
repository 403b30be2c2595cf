"""Makes the table of docs/results/together.md and the single figures in its text."""

from typing import Any

from shared.results import table

LOSSLESS = ("shuffle", "offload")
HEAD = (
    "techniques", "perplexity", "against plain", "experts a step reads, of plain top-k's", "max/mean load",
    "remote", "KiB between devices", "cache hits", "KiB from the host", "changed", "tokens/s",
)  # fmt: skip


def techniques(rows: dict[str, Any]) -> str:
    """Returns the table, which has a row for each set of techniques."""
    return table(HEAD, [line(name, row, rows["plain"]) for name, row in rows.items()])


def line(name: str, row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    moe, tokens = row["moe"], row["tokens"]
    needed = moe["expert_cache_hits"] + moe["expert_cache_misses"]
    changed = sum(moe[name] for name in ("dropped", "rerouted", "remapped"))
    return [
        name,
        f"{row['perplexity']:.3f}",
        f"{100 * (row['perplexity'] / plain['perplexity'] - 1):+.2f} %" if row is not plain else "",
        f"{moe['active_experts']:.2f} of {moe['active_experts_baseline']:.2f}",
        f"{moe['max_over_mean_load']:.2f}",
        f"{100 * moe['remote_assignments'] / moe['assignments']:.1f} %",
        f"{moe['transport_bytes'] / tokens / 1024:.1f}",
        f"{100 * moe['expert_cache_hits'] / needed:.1f} %" if needed else "all resident",
        f"{moe['bytes_host_to_device'] / tokens / 1024:.1f}" if needed else "",
        f"{100 * changed / (moe['assignments'] + moe['dropped']):.1f} %",
        f"{row['tokens_per_second']:.0f}",
    ]


def apart(rows: dict[str, Any]) -> float:
    """Returns the largest difference between a lossless row's loss and plain's, in nats a token."""
    return max(abs(rows[name]["nll_per_token"] - rows["plain"]["nll_per_token"]) for name in LOSSLESS)


def lost(rows: dict[str, Any], name: str) -> str:
    """Returns the relative difference between the row's perplexity and plain's, in percent."""
    return f"{100 * (rows[name]['perplexity'] / rows['plain']['perplexity'] - 1):+.2f} %"
