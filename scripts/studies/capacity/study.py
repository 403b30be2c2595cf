"""Capacity-aware inference (He et al., arXiv 2503.05066).

Parts: quality (loss of the bundled model under every policy) and load (the straggler on published routing),
both deterministic; speed (a layer's time, from one device: on an idle machine, with --gpu at the real sizes).
"""

import argparse

from studies.record import Part, Results, Study

LINK_GBS = {False: 12.5, True: 450.0}  # 100 Gbit/s Ethernet; NVLink 4, one direction


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="quality: the model")
    parser.add_argument("--tokens", type=int, default=4096, help="quality: tokens scored in a domain")
    parser.add_argument("--length", type=int, default=512, help="quality: tokens of a window")
    parser.add_argument("--rows", type=int, default=1, help="quality: windows on a rank in a step")
    parser.add_argument("--batch", type=int, default=1024, help="load: tokens on a rank")
    parser.add_argument("--rounds", type=int, default=5, help="speed: paired rounds")
    parser.add_argument("--gpu", action="store_true", help="speed: real layer sizes, on an accelerator")
    parser.add_argument("--link", type=float, help="speed: GB/s of a rank's link, each way")


def quality(args: argparse.Namespace, results: Results) -> Results:
    import jax
    from studies.capacity.quality import RANKS, measure

    jax.config.update("jax_num_cpu_devices", RANKS)
    return measure(args.model, args.data / "valid", args.tokens, args.length, args.rows)


def load(args: argparse.Namespace, results: Results) -> Results:
    from studies.capacity.load import measure

    return measure(args.data / "routing", args.batch)


def speed(args: argparse.Namespace, results: Results) -> Results:
    from studies.capacity.speed import measure

    return measure(args.data / "routing", args.gpu, args.link or LINK_GBS[args.gpu], args.rounds)


STUDY = Study(
    "capacity",
    __doc__ or "",
    (
        Part("quality", quality, "valid", ("model", "tokens", "length", "rows")),
        Part("load", load, "routing", ("batch",)),
        Part("speed", speed, "routing", ("rounds", "gpu", "link"), has_gpu_form=True),
    ),
    add_options,
    ("quality_tables", "load_tables", "speed_tables"),
)
