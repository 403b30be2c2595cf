"""Measures a technique or the engine, for a document of docs/results.

    python scripts/study.py capacity --data ../shared/data --parts quality load
    python scripts/study.py capacity --parts       # writes the document again from the stored figures
    python scripts/study.py capacity --help        # its parts, and what each of them measures

A part's figures replace its last ones in the study's JSON; the document and the plots are made from the JSON
alone. The plots need the ``plots`` extra. Times want an idle machine.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from shared.pinning import pin
from shared.results import draw_plots, dumps
from studies.binning.study import STUDY as BINNING
from studies.capacity.study import STUDY as CAPACITY
from studies.offload.study import STUDY as OFFLOAD
from studies.quantised.study import STUDY as QUANTISED
from studies.record import Part, Results, Study
from studies.reproducibility.study import STUDY as REPRODUCIBILITY
from studies.serving.study import STUDY as SERVING
from studies.shuffle.study import STUDY as SHUFFLE
from studies.together.study import STUDY as TOGETHER
from studies.ttft.study import STUDY as TTFT

ROOT = Path(__file__).parents[1]
TECHNIQUES = (BINNING, CAPACITY, SHUFFLE, OFFLOAD, TOGETHER)
STUDIES = {study.name: study for study in (*TECHNIQUES, SERVING, TTFT, REPRODUCIBILITY, QUANTISED)}
RAW = argparse.RawDescriptionHelpFormatter


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("study.py", description=__doc__, formatter_class=RAW)
    ways = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    for study in STUDIES.values():
        one = ways.add_parser(
            study.name,
            aliases=[study.alias] if study.alias else [],
            help=study.description.partition("\n")[0],
            description=study.description,
            formatter_class=RAW,
        )
        add_common(one, study)
        study.add_options(one)
        one.set_defaults(study=study.name)
    return parser


def add_common(parser: argparse.ArgumentParser, study: Study) -> None:
    """Adds the options that every study has."""
    if study.needs_data:
        parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    if study.is_whole:
        parser.add_argument(
            "--document", action="store_true", help="measure nothing, write the document anew"
        )
    else:
        names = [part.name for part in study.parts]
        parser.add_argument("--parts", nargs="*", choices=names, default=[], help="what to measure")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs/results", help=f"folder of {study.path(Path(), '.*')}"
    )
    parser.add_argument("--threads", type=int, default=2, help="cores that everything is pinned to")
    parser.add_argument("--dry", action="store_true", help="each part in its smallest form; writes nothing")


def requested_parts(study: Study, args: argparse.Namespace) -> list[Part]:
    """Returns the parts to measure, in the order of the options."""
    if study.is_whole:
        return [] if args.document else [*study.parts]
    by_name = {part.name: part for part in study.parts}
    return [by_name[name] for name in args.parts]


def command(study: Study, part: Part, args: argparse.Namespace) -> str:
    """Returns the command that measures the part again, with the options that are not at their defaults."""
    words = [f"python scripts/study.py {study.name}"]
    words += ["--data ../shared/data"] if study.needs_data else []
    words += [] if study.is_whole else [f"--parts {part.name}"]
    own = argparse.ArgumentParser(add_help=False)
    study.add_options(own)
    for action in own._actions:
        value = getattr(args, action.dest)
        if value == action.default or not (study.is_whole or action.dest in part.options):
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [action.option_strings[0], *(shlex.quote(str(v)) for v in values)]
    return " ".join(words)


def measure(study: Study, part: Part, args: argparse.Namespace, results: Results) -> Results | None:
    """Returns the part's figures. If its data is absent, prints a line that says so and returns None."""
    if part.data and not (needed := args.data / part.data).is_dir():
        print(f"{part.name}: skipped, there is no {needed}")
        return None
    return part.measure(args, results)


def stored(study: Study, args: argparse.Namespace) -> Results:
    """Returns the stored figures."""
    path = study.path(args.out, ".json")
    return json.loads(path.read_text()) if path.exists() else {}


def take(study: Study, part: Part, args: argparse.Namespace) -> None:
    """Measures the part and puts its figures into the JSON. With ``--dry`` it prints them instead."""
    figures = measure(study, part, args, stored(study, args))
    if args.dry:
        print(dumps({part.name: figures}))
    elif figures is not None:
        keep(study, part, args, figures)


def keep(study: Study, part: Part, args: argparse.Namespace, figures: Results) -> None:
    """Puts the part's figures into the JSON in place of its earlier figures."""
    figures = {"command": command(study, part, args)} | figures
    if not study.is_whole:
        key = f"{part.name}_gpu" if part.has_gpu_form and args.gpu else part.name
        figures = stored(study, args) | {key: figures}
    args.out.mkdir(parents=True, exist_ok=True)
    study.path(args.out, ".json").write_text(dumps(figures, study.depth))


def write(study: Study, args: argparse.Namespace) -> None:
    """Writes the document and the plots, only from the JSON."""
    results = stored(study, args)
    args.out.mkdir(parents=True, exist_ok=True)
    study.path(args.out, ".md").write_text(study.document(results))
    if plots := study.plots(results):
        draw_plots(plots, args.out)


def take_each(parts: list[Part]) -> None:
    """Measures each part in its own process with this process's options: some parts need several devices."""
    for part in parts:
        words = [__file__, *sys.argv[1:], "--parts", part.name]  # the last --parts is the one that counts
        subprocess.run([sys.executable, *words], check=True)


def main() -> None:
    args = make_parser().parse_args()
    study = STUDIES[args.study]
    parts = requested_parts(study, args)
    if len(parts) > 1:
        return take_each(parts)
    if not getattr(args, "gpu", False):
        pin(args.threads)
    for part in parts:
        take(study, part, args)
    if not args.dry:
        write(study, args)


if __name__ == "__main__":
    main()
