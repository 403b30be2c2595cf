"""Writes figures as JSON, tables of a document and plots, and reads ``--dry``, for studies and benchmarks."""

import argparse
import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Plot = Callable[[Any], Any]  # from pyplot to a figure
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "jmoe", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def dumps(results: dict[str, Any], depth: int = 4) -> str:
    """Returns JSON with a line for each value below ``depth`` levels."""

    def lines(value: Any, level: int) -> str:
        if not isinstance(value, dict) or level == depth or not value:
            return json.dumps(value)
        pad = " " * (level + 1)
        body = ",\n".join(f"{pad}{json.dumps(k)}: {lines(v, level + 1)}" for k, v in value.items())
        return f"{{\n{body}\n{pad[1:]}}}"

    return lines(results, 0) + "\n"


def few(dry: bool) -> slice:
    """Returns which settings of a list a part measures: all, or only the first, to try its flow."""
    return slice(0, 1) if dry else slice(None)


def smallest(args: argparse.Namespace, values: dict[str, Any]) -> argparse.Namespace:
    """Returns a part's options; with ``--dry``, those in ``values`` have these values, to try its flow."""
    return argparse.Namespace(**vars(args) | values) if args.dry else args


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a Markdown table without a newline at its end."""
    head = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def signed(value: float, error: float, digits: int = 4) -> str:
    return f"{value:+.{digits}f} ± {error:.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace("-0.0 ", "0.0 ")


def mean_error(delta_N: "np.ndarray", domains: int) -> tuple[float, float]:
    """Returns the mean over windows and its standard error.

    delta_N: value of each window, domain by domain, with the same number of windows in each domain.
    domains: number of domains.
    """
    delta_DW = delta_N.reshape(domains, -1)
    variance = delta_DW.var(axis=1, ddof=1).sum() * delta_DW.shape[1] if delta_DW.shape[1] > 1 else 0.0
    return float(delta_N.mean()), math.sqrt(variance) / delta_N.size


def perplexity_change(delta_N: "np.ndarray", domains: int) -> tuple[float, float]:
    """Returns the change of perplexity in % from losses in nats a token, and its standard error."""
    mean, error = mean_error(delta_N, domains)
    return 100 * math.expm1(mean), 100 * math.exp(mean) * error


def verdict(value: float, error: float) -> str:
    """Returns whether ``value`` is above 0 at two standard errors: "yes", "no" (below 0) or "even"."""
    return "yes" if value > 2 * error else "no" if value < -2 * error else "even"


def draw_plots(plots: dict[str, Plot], folder: Path) -> None:
    """Writes ``<name>.svg`` of every plot."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is absent (pip install 'jmoe[plots]')")
        return
    matplotlib, pyplot = map(importlib.import_module, ("matplotlib", "matplotlib.pyplot"))
    pyplot.switch_backend("svg")
    with matplotlib.rc_context(STYLE):
        for name, plot in plots.items():
            figure = plot(pyplot)
            figure.tight_layout()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            pyplot.close(figure)
