"""Measures fMoE, expert offload (Yu et al., arXiv 2502.05370), for docs/results/offload.md.

    python scripts/bench_offload.py --data ../shared/data --parts simulate mt_bench sensitivity
    python scripts/bench_offload.py --data ../shared/data --parts large engine   # on an idle machine
    python scripts/bench_offload.py --parts                                      # writes the document anew

Parts: simulate (the bundled model on held-out text, every comparator, budget and batch, in the simulator;
deterministic), mt_bench (the same on MT-bench's questions and the model's own answers), sensitivity (one
parameter at a time), large (a random model of 0.9 billion parameters), engine (``studies.offload.engine``:
the engine itself, its tokens, counters and time). A part's figures replace its last ones in the JSON; the
document is made from the JSON alone. The plots need the ``plots`` extra.
"""

import argparse
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from shared.protocol import pin
from shared.results import command, dumps, few, run_each

ROOT = Path(__file__).parents[1]
PARTS = ("simulate", "mt_bench", "sensitivity", "large", "engine")
PROMPT, NEW = 128, 64  # tokens of a window
TRAIN = 64  # windows of a domain in the profile
SHARES = (0.1, 0.25, 0.5, 0.75)
MAIN = 0.25


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bench_offload.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[], help="what to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results", help="folder of offload.*")
    parser.add_argument("--threads", type=int, default=2, help="cores that everything is pinned to")
    parser.add_argument("--windows", type=int, default=6, help="simulate, sensitivity: of each domain")
    parser.add_argument("--sizes", type=Path, default=ROOT / "configs/model/olmoe-0.9b.toml",
                        help="large: of the random model")  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="each part in its smallest form; writes nothing")
    parser.add_argument("--model", default="tiny", help="simulate, mt_bench, sensitivity, engine: the model")
    return parser


def measure(part: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """The part's figures, or None, with a line, where what it needs is absent."""
    needed = args.data / ("workloads" if part in ("mt_bench", "engine") else "valid")
    if part != "large" and not needed.is_dir():
        print(f"{part}: skipped, there is no {needed}")
        return None
    start = time.perf_counter()
    if part == "engine":
        from studies.offload.engine import measure

        found = measure(args.data, args.model, args.dry)
    elif part == "large":
        from studies.offload.large import measure

        found = measure(args.sizes, args.dry)
    else:
        found = simulated(part, args)
    return found | {"seconds": round(time.perf_counter() - start)}


def simulated(part: str, args: argparse.Namespace) -> dict[str, Any]:
    from studies.offload.simulate import COMPARATORS, VARIED, Subject, sensitivity, sweep
    from studies.offload.traces import make_traces, mt_bench_windows, route_windows, valid_windows
    from studies.speculative.routing import collect

    from jmoe import LLM

    source = collect(args.model, args.data / "train", 2 if args.dry else TRAIN)
    profile = source.profile(source.domains)
    sizes = {"dtype": "float32", "max_num_seqs": 16, "max_model_len": PROMPT + NEW, "warm_up": False}
    with closing(LLM(args.model, **sizes)) as llm:
        if part == "mt_bench":
            file = args.data / "workloads/mt_bench.jsonl.gz"
            windows_WT = mt_bench_windows(llm, file, PROMPT, NEW)
        else:
            windows_WT = valid_windows(llm, args.data / "valid", args.windows, PROMPT + NEW)
        model = llm.engine.runner.model
        routed, cfg = route_windows(model, windows_WT), model.cfg
        embeddings_VD = np.asarray(model.embed[...]).astype(np.float32)
    batches = ((1, 4, 8, 16) if part == "simulate" else (1,))[few(args.dry)]
    by_batch = {batch: make_traces(routed, PROMPT, batch) for batch in batches}
    subject = Subject(cfg, embeddings_VD, profile, by_batch[1])
    about = {
        "windows": len(windows_WT), "prompt": PROMPT, "new": NEW, "profile_tokens": profile.tokens,
        "iterations": int((profile.sample.map_tokens_QM >= 0).sum()),
        "layers": cfg.num_hidden_layers, "experts": cfg.num_experts, "k": cfg.num_experts_per_tok,
    }  # fmt: skip
    names = tuple(COMPARATORS)[few(args.dry)]
    if part == "sensitivity":
        slots = round(cfg.num_hidden_layers * cfg.num_experts * MAIN)
        return about | {"slots": slots, "runs": sensitivity(subject, slots, VARIED[few(args.dry)])}
    shares = SHARES[few(args.dry)] if part == "simulate" else (MAIN,)
    return about | {"runs": sweep(subject, by_batch, shares, names)}


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if len(args.parts) > 1:
        return run_each(__file__, args.parts, PARTS)
    pin(args.threads)
    if args.dry:
        print(dumps({part: measure(part, args) for part in args.parts}))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "offload.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts:
        if (figures := measure(part, args)) is not None:
            results[part] = {"command": command(make_parser(), args, part)} | figures
            path.write_text(dumps(results))
    from studies.offload.plots import draw
    from studies.offload.report import document

    (args.out / "offload.md").write_text(document(results))
    draw(results, args.out)


if __name__ == "__main__":
    main()
