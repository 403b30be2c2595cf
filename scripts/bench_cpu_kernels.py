"""Prints what the CPU's expert kernels reach: bytes streamed, products computed, time against active experts.

    python scripts/bench_cpu_kernels.py --threads 2 [--model configs/model/olmoe-0.9b.toml] [--json OUT]

The weights of several layers lie in memory as the loader places them (huge pages) and are taken in turn, so
that caches do not hold them. Read bandwidth is the best of several passes of numpy over as many bytes, one
thread a core. "xla" is the portable form of the same layer. Medians of paired rounds. Run it on an idle
machine.

With ``--forms`` it prints instead what every form of quantised weights reaches, by rows an expert: weights
per second, stored bytes per second, and these as a share of the read bandwidth, which is measured on the same
weights just before; the best of the runs of some seconds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from shared.pinning import pin


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("configs/model/olmoe-0.9b.toml"))
    parser.add_argument("--threads", type=int, default=2, help="cores that everything is pinned to")
    parser.add_argument("--layers", type=int, default=4, help="layers of weights taken in turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--forms", action="store_true", help="measure the forms of quantised weights")
    parser.add_argument("--megabytes", type=int, default=384, help="with --forms: stored bytes of a form")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 2, 4, 8, 32, 64], help="with --forms: rows an expert"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="with --forms: time of a measurement")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def routed(tokens: int, k: int, allowed: int, seed: int = 0) -> Any:
    """Returns for each token ``k`` distinct experts among the first ``allowed`` ones."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(allowed)[:k] for _ in range(tokens)]).astype(np.int32)


def measure_forms(args: argparse.Namespace, dims: tuple[int, int, int], isa: str) -> None:
    """Prints a table of the forms, with experts of the model's sizes, as many as needed."""
    import jax
    import numpy as np
    from cpu_kernels.quantised import FORMS, measure, random_experts
    from shared.layer_timing import read_bandwidth

    _, inner, model = dims
    rows, found = args.rows, []
    print(f"{isa}, {args.threads} threads")
    print("| form | activations | " + " | ".join(f"{n} rows: Gweights/s (GB/s, share)" for n in rows) + " |")
    print("|---|---|" + "---|" * len(rows))
    for name, coding in FORMS.items():
        one = 3 * inner * model * 2 if coding is None else coding.nbytes((3, inner, model))
        weights = random_experts(coding, (max(2, (args.megabytes << 20) // one), inner, model))
        arrays = [np.asarray(a) for a in jax.tree.leaves(weights)]
        stored, largest = sum(a.nbytes for a in arrays), sorted(arrays, key=lambda a: a.nbytes)[-2:]
        for activations in ("auto",) if coding is None else ("auto", "int8"):
            bandwidth = read_bandwidth(largest, args.threads)  # of gate and up, and of down
            speeds = [measure(weights, n, activations, stored, args.seconds) for n in rows]
            cells = [f"{s.weights / 1e9:.1f} ({s.read / 1e9:.1f}, {s.read / bandwidth:.0%})" for s in speeds]
            print(f"| {name} | {activations} | " + " | ".join(cells) + " |", flush=True)
            found.append({
                "form": name, "activations": activations, "rows": rows, "bandwidth": bandwidth,
                "weights_per_s": [s.weights for s in speeds], "bytes_per_s": [s.read for s in speeds],
            })  # fmt: skip
    if args.json:
        figures = {"threads": args.threads, "isa": isa, "forms": found}
        args.json.write_text(json.dumps(figures, indent=1))


def main() -> None:
    args = arguments()
    pin(args.threads)

    import numpy as np
    from jmoe_kernels import cpu
    from shared.layer_timing import layers_step, linearity, make_layers, median_seconds, read_bandwidth

    from jmoe.config.model import ModelConfig
    from jmoe.config.reading import read_toml

    library = cpu.get_library()
    if isinstance(library, str):
        raise SystemExit(f"no C++ kernels here: {library}")
    cfg = ModelConfig.from_dict(read_toml(args.model))
    e, f, d, k = cfg.num_experts, cfg.moe_intermediate_size, cfg.hidden_size, cfg.num_experts_per_tok
    if args.forms:
        return measure_forms(args, (e, f, d), library.isa)
    layers = make_layers(cfg, args.layers)
    bandwidth = read_bandwidth([np.asarray(w.gate_up_E2FD) for w in layers], args.threads)
    print(f"{library.isa}, {args.threads} threads; read bandwidth {bandwidth / 1e9:.1f} GB/s")
    print(f"{args.model.stem}: {e} experts of {3 * f * d * 2 / 1e6:.2f} MB, top {k}; times a layer\n")

    runs = {name: layers_step(name, k) for name in ("cpu", "xla")}
    rng, rows = np.random.default_rng(1), []
    print("| tokens | active experts | cpu, ms | GB/s | of bandwidth | Gflop/s | xla, ms | xla / cpu |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in (1, 4, 8, 16, 32, 64, 512):
        x, ids = rng.standard_normal((tokens, d), np.float32), routed(tokens, k, e)
        took = median_seconds(runs, x, ids, layers, args.rounds)
        active = len(np.unique(ids))
        read, flop = active * 3 * f * d * 2 / took["cpu"], 6 * tokens * k * f * d / took["cpu"]
        rows.append({"tokens": tokens, "active": active, **took, "bytes_per_s": read, "flop_per_s": flop})
        print(
            f"| {tokens} | {active} | {took['cpu'] * 1e3:.2f} | {read / 1e9:.1f} | {read / bandwidth:.0%} "
            f"| {flop / 1e9:.0f} | {took['xla'] * 1e3:.2f} | {took['xla'] / took['cpu']:.1f} |"
        )

    x, points = rng.standard_normal((16, d), np.float32), []
    print("\n16 tokens whose experts are confined:")
    for allowed in sorted({e, 3 * e // 4, e // 2, e // 4, max(k, e // 8)}):
        ids = routed(16, k, allowed)
        took = median_seconds({"cpu": runs["cpu"]}, x, ids, layers, args.rounds)["cpu"]
        points.append((len(np.unique(ids)), took))
        print(f"  {points[-1][0]} active: {took * 1e3:.2f} ms")
    fixed, each, r2 = linearity([p[0] for p in points], [p[1] for p in points])
    print(f"  {fixed * 1e3:.2f} ms + {each * 1e3:.3f} ms an active expert, R^2 {r2:.4f}")
    if args.json:
        figures = {"bandwidth": bandwidth, "isa": library.isa, "threads": args.threads, "rows": rows}
        args.json.write_text(json.dumps(figures | {"active": points, "r_squared": r2}, indent=1))


if __name__ == "__main__":
    main()
