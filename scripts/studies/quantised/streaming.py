"""Measures the part streaming: the rate at which the experts' kernel reads weights of every form.

The figures are those of ``bench_cpu_kernels.py --forms``; those of other numbers of cores stay.
"""

import argparse
from typing import Any

from shared.origin import machine
from shared.results import smallest
from studies.quantised.commands import figures_of

SMALLEST = {"seconds": 0.05, "megabytes": 1}
MEGABYTES = 384  # of a form's weights, so that no cache holds them


def measure(args: argparse.Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of the results: figures by number of cores."""
    args = smallest(argparse.Namespace(**vars(args), megabytes=MEGABYTES), SMALLEST)
    words = ["--model", args.sizes, "--threads", args.threads, "--forms"]
    words += ["--seconds", args.seconds, "--megabytes", args.megabytes, "--rows", 1]
    found = figures_of("bench_cpu_kernels.py", *words)
    here = machine(("jax",)) | {"isa": found["isa"], "model": args.sizes.stem, "forms": found["forms"]}
    return {"threads": stored.get("threads", {}) | {str(args.threads): here}}
