"""fMoE, expert offload (Yu et al., arXiv 2502.05370).

Parts: simulate (the bundled model on held-out text, every comparator, budget and batch, in the simulator;
deterministic), mt_bench (the same on MT-bench's questions and the model's own answers), sensitivity (one
parameter at a time), quantised (the engine with quantised experts in pools of the same bytes: hits, bytes and
quality; deterministic); on an idle machine large (a random model of 0.9 billion parameters), engine (the
engine itself, its tokens, counters and time) and quantised_speed (the times of quantised's pools).
"""

import argparse
from pathlib import Path

from studies.record import OLMOE, Part, Results, Study


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--windows", type=int, default=6, help="simulate, sensitivity: of each domain")
    parser.add_argument("--sizes", type=Path, default=OLMOE, help="large: of the random model")
    users = "simulate, mt_bench, sensitivity, engine, quantised, quantised_speed"
    parser.add_argument("--model", default="tiny", help=f"{users}: the model")


def simulate(args: argparse.Namespace, results: Results) -> Results:
    from studies.offload.simulate import measure

    return measure(args.data, args.model, args.windows, args.dry)


def mt_bench(args: argparse.Namespace, results: Results) -> Results:
    from studies.offload.mt_bench import measure

    return measure(args.data, args.model, args.dry)


def sensitivity(args: argparse.Namespace, results: Results) -> Results:
    from studies.offload.sensitivity import measure

    return measure(args.data, args.model, args.windows, args.dry)


def large(args: argparse.Namespace, results: Results) -> Results:
    from studies.offload.large import measure

    return measure(args.sizes, args.dry)


def engine(args: argparse.Namespace, results: Results) -> Results:
    from studies.offload.engine import measure

    return measure(args.data, args.model, args.dry)


def quantised(args: argparse.Namespace, results: Results) -> Results:
    from studies.offload.quantised import measure

    return measure(args.data, args.model, args.dry)


def quantised_speed(args: argparse.Namespace, results: Results) -> Results:
    from studies.offload.quantised_speed import measure

    return measure(args.data, args.model, args.dry)


STUDY = Study(
    "offload",
    __doc__ or "",
    (
        Part("simulate", simulate, "valid", ("windows", "model")),
        Part("mt_bench", mt_bench, "workloads", ("model",)),
        Part("sensitivity", sensitivity, "valid", ("windows", "model")),
        Part("large", large, "", ("sizes",)),
        Part("engine", engine, "workloads", ("model",)),
        Part("quantised", quantised, "valid", ("model",)),
        Part("quantised_speed", quantised_speed, "valid", ("model",)),
    ),
    add_options,
    ("simulator_tables", "engine_tables"),
)
