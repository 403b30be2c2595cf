"""Measures capacity-aware inference (He et al., arXiv 2503.05066) for docs/results/capacity.md.

    python scripts/bench_capacity.py --data ../shared/data --parts quality load    # deterministic
    python scripts/bench_capacity.py --data ../shared/data --parts speed           # on an idle machine
    python scripts/bench_capacity.py --parts                                       # writes the document anew

Parts: quality (``studies.capacity.quality``: loss of the bundled model under every policy), load
(``studies.capacity.load``: the straggler on published routing), speed (``studies.capacity.speed``: a layer's
time, from one device). A part's figures replace its last ones in the JSON; the document is made from the JSON
alone. ``--gpu`` runs speed at the real layer sizes. The plots need the ``plots`` extra.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from shared.protocol import pin
from shared.results import command, dumps, run_each

ROOT = Path(__file__).parents[1]
PARTS = ("quality", "load", "speed")
LINK_GBS = {False: 12.5, True: 450.0}  # 100 Gbit/s Ethernet; NVLink 4, one direction


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bench_capacity.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[], help="what to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results", help="folder of capacity.*")
    parser.add_argument("--threads", type=int, default=2, help="cores that everything is pinned to")
    parser.add_argument("--model", default="tiny", help="quality: the model")
    parser.add_argument("--tokens", type=int, default=4096, help="quality: tokens scored in a domain")
    parser.add_argument("--length", type=int, default=512, help="quality: tokens of a window")
    parser.add_argument("--rows", type=int, default=1, help="quality: windows on a rank in a step")
    parser.add_argument("--batch", type=int, default=1024, help="load: tokens on a rank")
    parser.add_argument("--rounds", type=int, default=5, help="speed: paired rounds")
    parser.add_argument("--gpu", action="store_true", help="speed: real layer sizes, on an accelerator")
    parser.add_argument("--link", type=float, help="speed: GB/s of a rank's link, each way")
    parser.add_argument("--dry", action="store_true", help="each part in its smallest form; writes nothing")
    return parser


def measure(part: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """The part's figures, or None, with a line, where its data is absent."""
    needed = {"quality": args.data / "valid"}.get(part, args.data / "routing")
    if not needed.is_dir():
        print(f"{part}: skipped, there is no {needed}")
        return None
    if part == "quality":
        import jax
        from studies.capacity.quality import RANKS, measure

        jax.config.update("jax_num_cpu_devices", RANKS)
        return measure(args.model, needed, args.tokens, args.length, args.rows)
    if part == "load":
        from studies.capacity.load import measure

        return measure(needed, args.batch)
    from studies.capacity.speed import measure

    return measure(needed, args.gpu, args.link or LINK_GBS[args.gpu], args.rounds)


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if len(args.parts) > 1:  # each in a process of its own: quality wants 8 devices, speed one
        return run_each(__file__, args.parts, PARTS)
    if not args.gpu:
        pin(args.threads)
    if args.dry:
        for part in args.parts:
            measure(part, args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "capacity.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts:
        if (figures := measure(part, args)) is not None:
            key = "speed_gpu" if part == "speed" and args.gpu else part
            results[key] = {"command": command(parser, args, part)} | figures
            path.write_text(dumps(results))
    from studies.capacity.plots import draw
    from studies.capacity.report import document

    (args.out / "capacity.md").write_text(document(results))
    draw(results, args.out)


if __name__ == "__main__":
    main()
