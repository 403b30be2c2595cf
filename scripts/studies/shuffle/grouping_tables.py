"""Makes the tables of local activations for docs/results/shuffle.md."""

from typing import Any

from shared.results import percent, table
from studies.shuffle.targets import ACROSS, fewer

MAIN, STEP = "8", "256"
UNEVEN = 0.05  # the target
JUDGED = ("alternating", "cross_entropy", "exflow")


def remote(row: dict[str, Any], case: str = "tables") -> float:
    return 1 - row["steps"][STEP][case]["local"]


def pairs(row: dict[str, Any], case: str = "tables") -> float:
    return row["steps"][STEP][case]["pairs"]


# ---- in-domain


def in_domain(methods: dict[str, Any]) -> str:
    """Returns the table of one number of devices. It has a row for each method."""
    head = ["method", "local, 64", "local, 256", "pairs, 256", "dealt, local", "dealt, pairs"]
    head += ["load, all", "load, one domain", "solver, s"]
    return table(head, (row_of(name, row) for name, row in methods.items() if isinstance(row, dict)))


def row_of(name: str, row: dict[str, Any]) -> list[str]:
    small, large = row["steps"]["64"], row["steps"][STEP]
    return [
        f"`{name}`", percent(small["tables"]["local"]), percent(large["tables"]["local"]),
        f"{large['tables']['pairs']:.2f}", percent(large["dealt"]["local"]), f"{large['dealt']['pairs']:.2f}",
        f"{row['peak']:.3f}", f"{row['peak_single']:.3f}", f"{row['solver_seconds']:.1f}",
    ]  # fmt: skip


def judged(methods: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Returns shares for each judged method.

    fewer: share by which remote activations are fewer than by chance.
    than_tables: share by which they are fewer than with random placements with tables.
    uneven: share by which the load of all text exceeds that of random placements.
    uneven_single: the same for the load of single domains.
    """
    random = methods["random"]
    found = {}
    for name in JUDGED:
        row = methods[name]
        found[name] = {
            "fewer": fewer(remote(row), remote(random, "dealt")),
            "than_tables": fewer(remote(row), remote(random)),
            "uneven": row["peak"] / random["peak"] - 1,
            "uneven_single": row["peak_single"] / random["peak_single"] - 1,
        }
    return found


def steps(methods: dict[str, Any]) -> dict[str, float]:
    """Returns the shares by which tables, grouping and both reduce remote activations.

    pairs: share by which both together reduce the pairs.
    """
    best, random = methods["alternating"], methods["random"]
    chance = remote(random, "dealt")
    return {
        "tables": fewer(remote(random), chance),
        "grouping": fewer(remote(best, "dealt"), chance),
        "both": fewer(remote(best), chance),
        "pairs": fewer(pairs(best), pairs(random, "dealt")),
    }


# ---- across domains


def solvers(rows: dict[str, Any]) -> list[str]:
    return [name for name in next(iter(rows.values())) if name not in ("unseen", "random")]


def saved(row: dict[str, Any], name: str) -> float:
    """Returns the share by which remote activations are fewer than with random placements without tables."""
    return fewer(remote(row[name]), remote(row["random"], "dealt"))


def across(rows: dict[str, Any]) -> str:
    """Returns the table, which has a row for each domain that was left out."""
    cells = []
    for domain, row in rows.items():
        guessed = remote(row["random"])
        line = [domain, percent(row["unseen"]), percent(1 - guessed)]
        for name in solvers(rows):
            line += [percent(1 - remote(row[name])), percent(saved(row, name))]
            line += [percent(fewer(remote(row[name]), guessed))]
        line += [percent(row["alternating"]["steps"][STEP]["history"]["local"])]
        cells.append([*line, f"{row['alternating']['peak'] / row['random']['peak'] - 1:+.1%}"])
    head = ["domain", "unseen ids", "random with tables, local"]
    for name in solvers(rows):
        head += [f"`{name}`, local", "fewer remote", "than random with tables"]
    return table([*head, "with history, local", "load against random's"], cells)


def outcome(rows: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a method's mean and worst saving over the domains, and the domains that miss the target."""
    less = {domain: saved(row, name) for domain, row in rows.items()}
    missed = [f"{d} ({percent(rows[d]['unseen'])} unseen)" for d, share in less.items() if share < ACROSS]
    return {"mean": sum(less.values()) / len(less), "worst": min(less.values()), "missed": missed}
