"""LYNX, batch-aware affinity binning (Gupta et al., arXiv 2411.08982).

Parts: quality (loss of the bundled model under every method) and capacity (binning and a capacity together),
both deterministic; speed (a layer and the engine: on an idle machine; with --gpu a layer of a real model, on
an accelerator).
"""

import argparse
from pathlib import Path

from studies.record import OLMOE, Part, Results, Study

DOMAINS = ["code_python", "en_fiction", "math_word", "zh_classic"]
SPEED = ("sizes", "layers", "batches", "context", "new", "rounds", "gpu")  # the options of the part


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="quality, capacity: the model")
    parser.add_argument("--domains", nargs="*", default=DOMAINS, help="quality, capacity: their domains")
    parser.add_argument("--windows", type=int, default=64, help="quality: of a domain, a multiple of 64")
    parser.add_argument("--length", type=int, default=64, help="quality: tokens of a window")
    parser.add_argument("--sizes", type=Path, default=OLMOE, help="speed: of the engine's random model")
    parser.add_argument("--layers", type=int, default=3, help="speed: layers of weights taken in turn")
    parser.add_argument("--batches", type=int, nargs="*", default=[16], help="speed: sequences at once")
    parser.add_argument("--context", type=int, default=128, help="speed: tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="speed: tokens generated for each")
    parser.add_argument("--rounds", type=int, default=9, help="speed: paired rounds")
    parser.add_argument("--gpu", action="store_true", help="speed: a layer at real sizes, on an accelerator")


def quality(args: argparse.Namespace, results: Results) -> Results:
    from studies.binning.quality import measure

    return measure(args.model, args.data / "valid", args.domains, args.windows, args.length, args.dry)


def capacity(args: argparse.Namespace, results: Results) -> Results:
    import jax
    from studies.binning.capacity import RANKS, measure

    jax.config.update("jax_num_cpu_devices", RANKS)
    return measure(args.model, args.data / "valid", args.domains, dry=args.dry)


def speed(args: argparse.Namespace, results: Results) -> Results | None:
    if args.gpu:
        from studies.binning.gpu import measure

        return measure(args.dry)
    from studies.binning.speed import measure

    return measure(args)


STUDY = Study(
    "binning",
    __doc__ or "",
    (
        Part("quality", quality, "valid", ("model", "domains", "windows", "length")),
        Part("capacity", capacity, "valid", ("model", "domains")),
        Part("speed", speed, "", SPEED, has_gpu_form=True),
    ),
    add_options,
    ("quality_tables", "capacity_tables", "speed_tables"),
    alias="lynx",
)
