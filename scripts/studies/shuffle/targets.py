"""Holds the targets of the study, and says which figures meet them."""

INSIDE, ACROSS = 0.30, 0.15  # the targets: fewer remote activations


def fewer(remote: float, baseline: float) -> float:
    """Returns by what share of the baseline ``remote`` is less than the baseline."""
    return 1 - remote / baseline


def met(value: float, target: float) -> str:
    return "met" if value >= target else "**missed**"
