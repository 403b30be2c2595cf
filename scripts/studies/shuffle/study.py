"""Speculative MoE, expert grouping and token shuffling (arXiv 2503.04398).

Parts: grouping (local activations of every method on held-out text), moves (tokens that change devices
between layers), published (local activations by published routing of real models), all deterministic; bytes
(arithmetic: what a layer sends on every pipeline, from the figures of grouping and moves); engine (the
engine's own counters and tokens, on 8 emulated devices) and locality (quality against bytes where a token
prefers its own device's experts).
"""

import argparse

from studies.record import Part, Results, Study

DOMAINS = ("code_python", "en_fiction", "math_word", "zh_classic")  # of locality, as in binning


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="grouping, moves, engine, locality: the model")
    parser.add_argument(
        "--train", type=int, default=64, help="grouping, moves: windows of 256 tokens a domain to learn from"
    )
    parser.add_argument("--windows", type=int, default=18, help="grouping, moves: those of a domain to test")


def grouping(args: argparse.Namespace, results: Results) -> Results:
    from studies.shuffle.grouping import measure

    return measure(args.model, args.data, args.train, args.windows, args.dry)


def moves(args: argparse.Namespace, results: Results) -> Results:
    from studies.shuffle.moves import measure

    return measure(args.model, args.data, args.train, args.windows)


def sent(args: argparse.Namespace, results: Results) -> Results | None:
    if "grouping" not in results or "moves" not in results:
        print("bytes: skipped, it takes its rates from the parts grouping and moves")
        return None
    from studies.shuffle.bytes import measure

    return measure(results["grouping"], results["moves"])


def published(args: argparse.Namespace, results: Results) -> Results:
    from studies.shuffle.published import measure

    return measure(args.data / "routing", args.dry)


def engine(args: argparse.Namespace, results: Results) -> Results:
    import jax
    from studies.shuffle.engine import GROUPS, RANKS, measure

    jax.config.update("jax_num_cpu_devices", GROUPS * RANKS)
    return measure(args.model, args.data)


def locality(args: argparse.Namespace, results: Results) -> Results:
    import jax
    from studies.shuffle.locality import RANKS, measure

    jax.config.update("jax_num_cpu_devices", RANKS)
    return measure(args.model, args.data / "valid", DOMAINS, dry=args.dry)


STUDY = Study(
    "shuffle",
    __doc__ or "",
    (
        Part("grouping", grouping, "valid", ("model", "train", "windows")),
        Part("moves", moves, "valid", ("model", "train", "windows")),
        Part("bytes", sent),
        Part("published", published, "routing"),
        Part("engine", engine, "valid", ("model",)),
        Part("locality", locality, "valid", ("model",)),
    ),
    add_options,
    ("grouping_tables", "bytes_tables", "published_tables", "engine_tables", "locality_tables", "targets"),
    depth=3,
    alias="speculative",
)
