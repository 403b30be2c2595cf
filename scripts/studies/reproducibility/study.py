"""How much a greedy answer depends on the requests that are computed in the same steps."""

import argparse

from studies.record import Part, Results, Study, at_least

DTYPES = ("float32", "bfloat16")


def add_options(parser: argparse.ArgumentParser) -> None:
    size = at_least(1)
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, or a directory with a tokenizer")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the weights, an engine each")
    add("--prompts", type=size, default=96, help="that are answered alone and together")
    add("--batch", type=size, default=16, help="sequences of a step")
    add("--copies", type=size, default=16, help="of one prompt at once")
    add("--max-tokens", type=size, default=32, help="of an answer")


def answers(args: argparse.Namespace, results: Results) -> Results:
    import jax
    from studies.reproducibility.answers import measure

    jax.config.update("jax_platforms", "cpu")
    return measure(args)


STUDY = Study(
    "reproducibility", __doc__ or "", (Part("answers", answers),), add_options, ("tables",), has_plots=False
)
