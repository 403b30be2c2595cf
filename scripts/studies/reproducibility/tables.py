"""Makes the table of docs/results/reproducibility.md."""

from typing import Any

from shared.results import table


def answers(settings: dict[str, int], dtypes: dict[str, Any]) -> str:
    """Returns the table, which has a row for each dtype and case."""
    rows = [
        [
            dtype,
            f"{case} ({settings[case]})",
            f"{found['changed']} of {found['answers']}",
            f"{found['logprob']:.1e}",
        ]
        for dtype, cases in dtypes.items()
        for case, found in cases.items()
    ]
    head = ["dtype", "together", "answers with another token", "log-probabilities apart by at most"]
    return table(head, rows)
