"""Measures Speculative MoE, expert grouping and token shuffling (arXiv 2503.04398), for speculative.md.

    python scripts/bench_speculative.py --data ../shared/data --parts grouping moves published
    python scripts/bench_speculative.py --data ../shared/data --parts bytes   # arithmetic
    python scripts/bench_speculative.py --data ../shared/data --parts engine  # 8 emulated devices
    python scripts/bench_speculative.py --parts                               # writes the document anew

The first three are deterministic.

Parts: grouping (``studies.speculative.grouping``: local activations of every method on held-out text), moves
(``studies.speculative.moves``: tokens that change devices between layers), bytes
(``studies.speculative.bytes``: what a layer sends on every pipeline, from the figures of grouping and moves),
published (``studies.speculative.published``: local activations by published routing of real models), engine
(``studies.speculative.engine``: the engine's own counters and tokens). A part's figures replace its last ones
in the JSON; the document is made from the JSON alone. The plots need the ``plots`` extra.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from shared.protocol import pin
from shared.results import command, dumps, run_each

ROOT = Path(__file__).parents[1]
PARTS = ("grouping", "moves", "bytes", "published", "engine", "locality")
DOMAINS = ("code_python", "en_fiction", "math_word", "zh_classic")  # of locality, as in bench_lynx


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bench_speculative.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[], help="what to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results", help="folder of speculative.*")
    parser.add_argument("--threads", type=int, default=2, help="cores that everything is pinned to")
    parser.add_argument("--model", default="tiny", help="the model of grouping and engine")
    parser.add_argument(
        "--train", type=int, default=64, help="grouping, moves: windows of 256 tokens a domain to learn from"
    )
    parser.add_argument("--windows", type=int, default=18, help="grouping, moves: those of a domain to test")
    parser.add_argument("--dry", action="store_true", help="each part in its smallest form; writes nothing")
    return parser


def measure(part: str, args: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any] | None:
    """The part's figures, or None, with a line, where what it needs is absent."""
    if part == "bytes":
        if "grouping" not in results or "moves" not in results:
            print("bytes: skipped, it takes its rates from the parts grouping and moves")
            return None
        from studies.speculative.bytes import measure

        return measure(results["grouping"], results["moves"])
    needed = args.data / ("routing" if part == "published" else "valid")
    if not needed.is_dir():
        print(f"{part}: skipped, there is no {needed}")
        return None
    if part == "grouping":
        from studies.speculative.grouping import measure

        return measure(args.model, args.data, args.train, args.windows, args.dry)
    if part == "moves":
        from studies.speculative.moves import measure

        return measure(args.model, args.data, args.train, args.windows)
    if part == "published":
        from studies.speculative.published import measure

        return measure(needed, args.dry)
    import jax

    if part == "locality":
        from studies.speculative.locality import RANKS, measure

        jax.config.update("jax_num_cpu_devices", RANKS)
        return measure(args.model, needed, DOMAINS, dry=args.dry)
    from studies.speculative.engine import GROUPS, RANKS, measure

    jax.config.update("jax_num_cpu_devices", GROUPS * RANKS)
    return measure(args.model, args.data)


def main() -> None:
    args = make_parser().parse_args()
    if len(args.parts) > 1:
        return run_each(__file__, args.parts, PARTS)
    pin(args.threads)
    if args.dry:
        for part in args.parts:
            measure(part, args, {})
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "speculative.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts:
        if (figures := measure(part, args, results)) is not None:
            results = json.loads(path.read_text()) if path.exists() else {}
            results[part] = {"command": command(make_parser(), args, part)} | figures
            path.write_text(dumps(results, depth=3))
    from studies.speculative.plots import draw
    from studies.speculative.report import document

    (args.out / "speculative.md").write_text(document(results))
    draw(results, args.out)


if __name__ == "__main__":
    main()
