"""Measures LYNX, batch-aware affinity binning (Gupta et al., arXiv 2411.08982), for docs/results/lynx.md.

    python scripts/bench_lynx.py --data ../shared/data --parts quality capacity    # deterministic
    python scripts/bench_lynx.py --parts speed                                     # on an idle machine
    python scripts/bench_lynx.py --parts                                           # writes the document anew

Parts: quality (``studies.lynx.quality``: loss of the bundled model under every method), capacity
(``studies.lynx.capacity``: binning and a capacity together), speed (``studies.lynx.speed``: a layer and the
engine, ``--gpu`` for ``studies.lynx.gpu``: a layer of a real model on an accelerator). A part's figures
replace its last ones in the JSON; the document is made from the JSON alone. The plots need the ``plots``
extra.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from shared.protocol import pin
from shared.results import command, dumps, run_each

ROOT = Path(__file__).parents[1]
PARTS = ("quality", "capacity", "speed")
DOMAINS = ["code_python", "en_fiction", "math_word", "zh_classic"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bench_lynx.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[], help="what to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results", help="folder of lynx.*")
    parser.add_argument("--threads", type=int, default=2, help="cores that everything is pinned to")
    parser.add_argument("--model", default="tiny", help="the model of quality and capacity")
    parser.add_argument("--domains", nargs="*", default=DOMAINS, help="domains of quality and capacity")
    parser.add_argument("--windows", type=int, default=64, help="quality: of a domain, a multiple of 64")
    parser.add_argument("--length", type=int, default=64, help="quality: tokens of a window")
    parser.add_argument("--sizes", type=Path, default=ROOT / "configs/model/olmoe-0.9b.toml",
                        help="speed: of the engine's random model")  # fmt: skip
    parser.add_argument("--layers", type=int, default=3, help="speed: layers of weights taken in turn")
    parser.add_argument("--batches", type=int, nargs="*", default=[16], help="speed: sequences at once")
    parser.add_argument("--context", type=int, default=128, help="speed: tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="speed: tokens generated for each")
    parser.add_argument("--rounds", type=int, default=9, help="speed: paired rounds")
    parser.add_argument("--gpu", action="store_true", help="speed: a layer at real sizes, on an accelerator")
    parser.add_argument("--dry", action="store_true", help="each part in its smallest form; writes nothing")
    return parser


def measure(part: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """The part's figures, or None, with a line, where what it needs is absent."""
    if part == "speed":
        if args.gpu:
            from studies.lynx.gpu import measure

            return measure(args.dry)
        from studies.lynx.speed import measure

        return measure(args)
    if not (valid := args.data / "valid").is_dir():
        print(f"{part}: skipped, there is no {valid}")
        return None
    if part == "quality":
        from studies.lynx.quality import measure

        return measure(args.model, valid, args.domains, args.windows, args.length, args.dry)
    import jax
    from studies.lynx.capacity import RANKS, measure

    jax.config.update("jax_num_cpu_devices", RANKS)
    return measure(args.model, valid, args.domains, dry=args.dry)


def main() -> None:
    args = make_parser().parse_args()
    if len(args.parts) > 1:
        return run_each(__file__, args.parts, PARTS)
    if not args.gpu:
        pin(args.threads)
    if args.dry:
        for part in args.parts:
            measure(part, args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "lynx.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts:
        if (figures := measure(part, args)) is not None:
            key = "speed_gpu" if part == "speed" and args.gpu else part
            results[key] = {"command": command(make_parser(), args, part)} | figures
            path.write_text(dumps(results))
    from studies.lynx.plots import draw
    from studies.lynx.report import document

    (args.out / "lynx.md").write_text(document(results))
    draw(results, args.out)


if __name__ == "__main__":
    main()
