"""The time to the first token over the size of the page pool and the number of slots.

Neither may cost anything: what a step takes depends on its tokens alone. It needs an idle machine.
"""

import argparse

from studies.record import Part, Results, Study, at_least


def add_options(parser: argparse.ArgumentParser) -> None:
    size = at_least(1)
    add = parser.add_argument
    add("--model", default="tiny", help="or a TOML of sizes, or a directory")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights")
    add("--slots", type=size, nargs="+", default=[1, 16, 64, 256], help="of an engine")
    add("--pools", type=size, nargs="+", default=[1, 8, 64], help="times the smallest pool")
    add("--requests", type=size, nargs="+", default=[1, 8, 32], help="that come at once")
    add("--busy", type=size, default=4, help="sequences that decode meanwhile")
    add("--prompt", type=size, default=64, help="tokens of each prompt")
    add("--rounds", type=size, default=63, help="of each engine, in turn")


def cases(args: argparse.Namespace, results: Results) -> Results:
    from studies.ttft.cases import measure

    return measure(args)


STUDY = Study(
    "ttft", __doc__ or "", (Part("cases", cases),), add_options, ("tables",), has_plots=False, depth=1
)
