"""The four techniques alone and together.

The bundled model with its experts on several emulated CPU devices scores the valid split in the decode step
(``jmoe eval --mode decode``), once with each set of techniques: what each does to the loss, to the experts
that a step reads, to the fullest expert, to what crosses between devices and to what comes from the host.
All figures but the speed are counts and do not depend on the machine; about 3 minutes on two cores.
"""

import argparse

from studies.record import Part, Results, Study


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=8192, help="scored with each set of techniques")
    parser.add_argument("--profile-tokens", type=int, default=65536, help="of the train split")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--ranks", type=int, default=4, help="emulated devices, all of one expert group")


def scores(args: argparse.Namespace, results: Results) -> Results:
    import jax
    from studies.together.scores import ScoreSizes, measure

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.ranks)
    if args.dry:
        return measure(args.data, ScoreSizes(args.batch, 512, args.batch, args.ranks))
    return measure(args.data, ScoreSizes(args.tokens, args.profile_tokens, args.batch, args.ranks))


STUDY = Study(
    "together",
    __doc__ or "",
    (Part("scores", scores, "valid"),),
    add_options,
    ("tables",),
    has_plots=False,
    depth=3,
)
