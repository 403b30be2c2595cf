"""Measures the part speed: ``bench_vs_llama_cpp.py`` with all forms, for the cores of ``--threads``.

The figures of other numbers of cores stay.
"""

import argparse
import sys
from typing import Any

from shared.origin import machine
from shared.results import smallest
from studies.quantised.commands import figures_of

QUANTIZATIONS, ACTIVATIONS = ("int8", "int4", "fp8"), ("auto", "int8")
SMALLEST = {"rounds": 1, "prompt": 8, "context": 8, "new": 4, "batches": [1]}


def measure(args: argparse.Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of the results: figures by number of cores."""
    args = smallest(args, SMALLEST)
    words = ["--model", args.sizes, "--threads", args.threads, "--rounds", args.rounds]
    words += ["--prompt", args.prompt, "--context", args.context, "--new", args.new]
    words += ["--batches", *args.batches, "--types", *args.types]
    words += ["--quantizations", *QUANTIZATIONS, "--activations", *ACTIVATIONS]
    words += ["--llama-python", args.llama_python or sys.executable]
    found = figures_of("bench_vs_llama_cpp.py", *words)
    kept = ("model", "check", "file_bytes", "tokens_per_second", "active_experts")
    options = {name: getattr(args, name) for name in ("rounds", "prompt", "context", "new")}
    here = machine(())
    here = here | {"versions": here["versions"] | found["versions"], "settings": options}
    return {"threads": stored.get("threads", {}) | {str(args.threads): here | {k: found[k] for k in kept}}}
