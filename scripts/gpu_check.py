"""Checks and times jmoe's GPU kernels on this machine's GPU: one command, one table, one JSON file.

    PYTHONPATH=.:kernels python scripts/gpu_check.py --out DIR --commit $(git rev-parse HEAD)

Each section runs on its own: one that fails is a line of the table, and the others go on. Sections not begun
when ``--budget`` seconds have passed are skipped, and say so. Sections: the machine's own limits (copy
bandwidth, dense bfloat16 products), correctness against float64 on the CPU, the bundled model's tokens,
decode and prefill of the layer sizes below, binning compared with its XLA form and with the decode layer,
experts copied from host memory alone and during a layer, every form of quantised weights beside bfloat16,
decode steps of a whole random model. Peers at each size: two bounds that no grouped product can be expected
to beat (all rows through one expert; an even batched product), ``jax.lax.ragged_dot``, and tokamax and torch
if they can be imported.

Times are medians of chained calls of one compiled loop that rotates over copies of the weights, so that the
50 MB cache does not hold them. ``--dry`` runs the whole flow on CPU at toy sizes with the interpreter.
"""

import argparse
import datetime
import functools
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gpu_checks.binning import METHODS, batches, binning_seconds, differing
from gpu_checks.codes import codes
from gpu_checks.correctness import correctness
from gpu_checks.engine import DecodeBench, greedy_tokens, tokens_on_cpu
from gpu_checks.offload import offload
from gpu_checks.peers import even_batch, jax_peers, one_group, ours, routed_sizes, torch_seconds
from gpu_checks.rows import Check, line
from shared.gpu_timing import random_rows, seconds_per_call, weight_bytes, weight_stacks
from shared.layer_sizes import LayerSizes, layer_sizes

MODELS = {
    "Qwen3-30B-A3B": layer_sizes("qwen3-30b-a3b"),
    "OLMoE": layer_sizes("olmoe-1b-7b"),
    "Mixtral-8x7B": layer_sizes("mixtral-8x7b"),
    "DeepSeek-V2-Lite": layer_sizes("deepseek-v2-lite"),
}
TOY = {"toy": LayerSizes(3, 64, 64, 2)}
DECODE_TARGET, PREFILL_TARGET = 0.85, 0.75  # of the measured copy bandwidth, of the measured dense rate
MEASURABLE = 250e6  # bytes of weights; the decode target counts from here on: below, launches dominate
LAUNCHES = 8  # roughly: two kernels, the map from windows to experts, the gather of the rows
DENSE_LIMIT = 5e14  # flop of a layer computed for every expert: about a second


# ---- sections


def limits(check: Check) -> None:
    """Measures copy bandwidth, the dense bfloat16 rate, and the cost of a step of the timing loop alone."""
    size = 1 << (12 if check.dry else 30)
    data = [jnp.full(size // 2, i, jnp.bfloat16) for i in range(2)]
    took = seconds_per_call(lambda x, w: w + x[0], jnp.zeros(8, jnp.bfloat16), data, check.dry)
    check.copy_bandwidth = 2 * size / took
    check.add(
        "limits", f"copy {size / 1e6:.0f} MB", "add", took, None, f"{check.copy_bandwidth / 1e12:.2f} TB/s"
    )

    n = 64 if check.dry else 8192
    a, b = random_rows(n, n), [random_rows(n, n, seed) for seed in (1, 2)]
    took = seconds_per_call(lambda x, w: x @ w.T, a, b, check.dry, calls=8)
    check.dense_rate = 2 * n**3 / took
    check.add("limits", f"{n}^3 bfloat16", "dense", took, None, f"{check.dense_rate / 1e12:.0f} Tflop/s")

    tiny = jnp.zeros(8, jnp.bfloat16)
    check.launch = seconds_per_call(lambda x, w: w * 2, tiny, [tiny, tiny], check.dry, calls=200)
    check.add("limits", "one empty step", "launch", check.launch)


def measure(
    check: Check, section: str, case: str, dims: tuple[int, int, int], sizes: np.ndarray, stacks: list
) -> dict[str, float]:
    """Returns every contender's seconds at one shape. A contender that raises gets a row but no entry."""
    x = random_rows(int(sizes.sum()), dims[2])
    contenders: dict[str, Callable[[], float | None]] = {}
    for name, step in {
        "jmoe": ours(sizes, check.dry),
        "bound: one group": one_group,
        "bound: even batch": even_batch,
        **jax_peers(sizes),
    }.items():
        contenders[name] = functools.partial(seconds_per_call, step, x, stacks, check.dry)
    contenders["torch grouped_mm"] = functools.partial(torch_seconds, sizes, dims, check.dry)
    took = {}
    for name, seconds in contenders.items():
        if name != "jmoe" and check.late(check.peer_share):
            check.add(section, case, name, verdict="skipped: out of time")
        elif name == "ragged_dot" and 6.0 * x.size * dims[1] * dims[0] > DENSE_LIMIT:
            check.add(section, case, name, verdict="skipped: where it is dense over all experts, too long")
        else:
            try:
                if (result := seconds()) is not None:
                    took[name] = result
            except Exception as error:
                kind = "ERROR" if name == "jmoe" else "peer's error"
                check.add(section, case, name, verdict=f"{kind} {type(error).__name__}: {str(error)[:160]}")
    return took


def report(
    check: Check, section: str, case: str, times: dict[str, float], floor: float, target: float | None
) -> None:
    """Adds the rows of one shape, with each contender's share of the ``floor`` (s) and jmoe's verdict."""
    peers = {name: t for name, t in times.items() if name != "jmoe" and not name.startswith("bound")}
    for name, seconds in times.items():
        verdict = ""
        if name == "jmoe":
            best = min(peers.values(), default=float("inf"))
            faster = "pass" if seconds <= best else "MISS"
            verdict = f"best peer x{best / seconds:.2f} {faster}"
            if target is None:
                verdict += f"; launches {LAUNCHES * check.launch / seconds:.0%}: no target"
            else:
                verdict += f"; target {target:.0%} {'pass' if floor / seconds >= target else 'MISS'}"
        check.add(section, case, name, seconds, floor / seconds, verdict)


def decode(check: Check) -> None:
    """Measures 1, 2 and 4 rows per expert with all experts active, then 8 tokens with random routing.

    The floor is that of the copy bandwidth.
    """
    check.peer_share = 0.6
    for name, (experts, inner, model, routed) in (TOY if check.dry else MODELS).items():
        dims = experts, inner, model
        stacks = weight_stacks(dims, check.dry)
        shapes = {
            f"{n} rows an expert": np.full(experts, n, np.int32) for n in ((1,) if check.dry else (1, 2, 4))
        }
        shapes["8 tokens"] = routed_sizes(2 if check.dry else 8, experts, routed)
        for label, sizes in shapes.items():
            case, read = f"{name}, {label}", weight_bytes(dims, int((sizes > 0).sum()))
            if check.late():
                check.add("decode", case, "", verdict="skipped: out of time")
                continue
            took = measure(check, "decode", case, dims, sizes, stacks)
            floor = read / (check.copy_bandwidth or float("nan"))
            report(check, "decode", case, took, floor, DECODE_TARGET if read >= MEASURABLE else None)


def prefill(check: Check) -> None:
    """Measures 4096 and 8192 tokens with random routing. The floor is that of the dense product's rate."""
    check.peer_share = 0.95
    for name, (experts, inner, model, routed) in (TOY if check.dry else MODELS).items():
        stacks = weight_stacks((experts, inner, model), check.dry)
        for tokens in (4,) if check.dry else (4096, 8192):
            case, sizes = f"{name}, {tokens} tokens", routed_sizes(tokens, experts, routed)
            if check.late():
                check.add("prefill", case, "", verdict="skipped: out of time")
                continue
            took = measure(check, "prefill", case, (experts, inner, model), sizes, stacks)
            floor = 6.0 * sizes.sum() * inner * model / (check.dense_rate or float("nan"))
            report(check, "prefill", case, took, floor, PREFILL_TARGET)


def binning(check: Check) -> None:
    """Counts the kernel's batches that equal the reference's, then times it, XLA and the decode layer."""
    for method in METHODS[:1] if check.dry else METHODS:
        cases = batches(method, check.dry)
        wrong = {case.name: names for case in cases if (names := differing(case, method, check.dry))}
        verdict = f"{len(cases) - len(wrong)} of {len(cases)} as the reference "
        check.add("binning", method, "kernel", verdict=verdict + (f"FAIL {wrong}" if wrong else "pass"))
    k = 2 if check.dry else 8
    for experts in (8,) if check.dry else (64, 128):
        for tokens in (4,) if check.dry else (16, 64):
            case = f"{experts} experts, {tokens} tokens"
            own, xla = (binning_seconds(n, tokens, experts, k, check.dry) for n in ("pallas_gpu", "xla"))
            verdict = f"XLA x{xla / own:.2f} {'pass' if own <= xla else 'MISS'}"
            layer = f"Qwen3-30B-A3B, {tokens * k // experts} rows an expert"
            took = [row.seconds for row in check.rows if (row.case, row.name) == (layer, "jmoe")]
            if experts == MODELS["Qwen3-30B-A3B"].experts and took and took[0]:
                verdict += f"; {own / took[0]:.1%} of the decode layer"
            check.add("binning", case, "kernel", own, verdict=verdict)
            check.add("binning", case, "xla", xla)


def engine(check: Check) -> None:
    """Compares the bundled model's greedy tokens in float32 with those of the CPU, which must be equal."""
    here, there = greedy_tokens(4 if check.dry else 32), tokens_on_cpu()
    equal = sum(a == b[: len(a)] for a, b in zip(here, there, strict=True))
    verdict = f"{equal} of {len(there)} as on the CPU {'pass' if equal == len(there) else 'FAIL'}"
    check.add("engine", 'LLM("tiny"), float32, greedy', f"{len(here[0])} tokens", verdict=verdict)


def model_decode(check: Check) -> None:
    """Measures a whole decode step of a random model, from embedding to sampled token.

    The floor is that of the copy bandwidth.
    """
    batches = (1, 4) if check.dry else (1, 16, 64)
    bench = DecodeBench(batches, check.dry)
    for batch in reversed(batches):
        seconds, active = bench.step_seconds(batch, 3 if check.dry else 30)
        floor = bench.bytes_read(batch, active) / (check.copy_bandwidth or float("nan"))
        case, verdict = f"Qwen3-30B-A3B shape, batch {batch}", f"{active:.1f} active experts a layer"
        check.add("model", case, "decode step", seconds, floor / seconds, verdict)


SECTIONS: tuple[Callable[[Check], None], ...] = (
    limits,
    correctness,
    engine,
    decode,
    binning,
    offload,
    prefill,
    codes,
    model_decode,
)


def main(argv: list[str] | None = None) -> int:
    """Runs the sections. The exit status is the number of failed sections and cases, at most 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of gpu_check.json")
    parser.add_argument("--commit", default="unknown", help="written to the JSON")
    parser.add_argument("--budget", type=float, default=500, help="seconds after which nothing new begins")
    parser.add_argument("--sections", nargs="*", default=[f.__name__ for f in SECTIONS])
    parser.add_argument("--dry", action="store_true", help="toy sizes on CPU, in the interpreter")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    if not args.dry and device.platform != "gpu":
        parser.error(f"needs a GPU, found {device.device_kind}; --dry runs toy sizes without one")
    check = Check(args.dry, time.monotonic(), args.budget)
    for section in SECTIONS:
        name = section.__name__
        if name not in args.sections:
            continue
        if check.late():
            check.add(name, "", "", verdict=f"skipped: the budget of {args.budget:.0f} s is spent")
            continue
        try:
            section(check)
        except Exception as error:
            traceback.print_exc()
            check.add(name, "", "", verdict=f"ERROR {type(error).__name__}: {str(error)[:200]}")
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit,
        "device": device.device_kind,
        "jax": jax.__version__,
        "dry": args.dry,
        "copy_bytes_per_s": check.copy_bandwidth,
        "dense_flop_per_s": check.dense_rate,
        "rows": [asdict(row) for row in check.rows],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu_check.json").write_text(json.dumps(result, indent=1))
    print(f"\n{device.device_kind}, jax {jax.__version__}, commit {args.commit}")
    for row in check.rows:
        print(line(row))
    return int(any(word in row.verdict for row in check.rows for word in ("ERROR", "FAIL")))


if __name__ == "__main__":
    raise SystemExit(main())
