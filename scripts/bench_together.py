"""Measures the four techniques alone and together, for docs/results/together.md.

    python scripts/bench_together.py --data ../shared/data       # about 3 minutes on two cores
    python scripts/bench_together.py --document                  # writes the document anew from the JSON

The bundled model with its experts on several emulated CPU devices scores the valid split in the decode step
(``jmoe eval --mode decode``), once with each set of techniques: what each does to the loss, to the experts
that a step reads, to the fullest expert, to what crosses between devices and to what comes from the host.
The placement and the profile are made of the train split, in a temporary folder. All figures but the speed
are counts and do not depend on the machine.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shared.results import dumps, table

ROOT = Path(__file__).parents[1]
BOTH, NEAR = "shuffle and capacity", "all four, near first"
ROWS = ("plain", "binning", "capacity", "shuffle", "offload", BOTH, "all four", NEAR)
LENGTH = 256  # tokens of a window
LOSSLESS = ("shuffle", "offload")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bench_together.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results", help="folder of together.*")
    parser.add_argument("--tokens", type=int, default=8192, help="scored with each set of techniques")
    parser.add_argument("--profile-tokens", type=int, default=65536, help="of the train split")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--ranks", type=int, default=4, help="emulated devices, all of one expert group")
    parser.add_argument("--document", action="store_true", help="measure nothing, write the document anew")
    return parser


def techniques(row: str, placement: Path, profile: Path) -> Any:
    """The settings of a row."""
    from jmoe.config.model import MoEConfig
    from jmoe.config.techniques import BinningConfig, CapacityConfig, OffloadConfig, ShuffleConfig

    every: dict[str, Any] = {
        "binning": BinningConfig(),
        "capacity": CapacityConfig(factor=2.0, policy="reroute", phase="both"),
        "shuffle": ShuffleConfig(str(placement)),
        "offload": OffloadConfig(slots_per_layer=2, store=str(profile)),
    }
    if row == NEAR:  # by a bin's width
        every["binning"] = BinningConfig(local_bonus=0.5, resident_bonus=0.5)
    names = every if row in ("all four", NEAR) else row.split(" and ")
    on = {name: every[name] for name in every if name in names}
    return MoEConfig(attention="tp", transport="ragged_all_to_all", **on)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.ranks)
    from jmoe.engine.build import EngineSettings
    from jmoe.tools.place import place
    from jmoe.tools.profile import profile
    from jmoe.tools.progress import Bars

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Bars() as bars:
        statistics, placed = Path(folder) / "profile.npz", Path(folder) / "placement.npz"
        texts = sorted((args.data / "train").glob("*.txt.xz"))
        sizes = EngineSettings(max_model_len=LENGTH, dtype="float32", attention="tp")
        profile(
            "tiny",
            texts,
            statistics,
            max_tokens=args.profile_tokens,
            settings=EngineSettings(max_model_len=LENGTH),
        )
        place(statistics, args.ranks, placed, "alternating", 0, bars)
        rows = {row: score(args, sizes, techniques(row, placed, statistics)) for row in ROWS}
    return {
        "command": f"python scripts/bench_together.py --data ../shared/data{options(args)}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jmoe", "jax", "numpy")},
        "ranks": args.ranks, "batch": args.batch, "length": LENGTH,
        "seconds": round(time.perf_counter() - start),
        "rows": rows,
    }  # fmt: skip


def options(args: argparse.Namespace) -> str:
    """Those that are not at their defaults."""
    default, names = make_parser().parse_args([]), ("tokens", "profile_tokens", "batch", "ranks")
    changed = [name for name in names if getattr(args, name) != getattr(default, name)]
    return "".join(f" --{name.replace('_', '-')} {getattr(args, name)}" for name in changed)


def score(args: argparse.Namespace, sizes: Any, moe: Any) -> dict[str, Any]:
    """The report of one set of techniques, and their settings. A first short run compiles."""
    from dataclasses import replace

    from jmoe.tools.evaluate import evaluate

    settings = replace(sizes, moe=moe, expert_parallel_size=args.ranks)
    texts = sorted((args.data / "valid").glob("*.txt.xz"))
    for tokens in (args.batch, args.tokens):
        report = evaluate(
            "tiny", texts, mode="decode", batch_size=args.batch, max_tokens=tokens, settings=settings
        )
    on = {
        name: asdict(getattr(moe, name))
        for name in ("binning", "capacity", "shuffle", "offload")
        if getattr(moe, name)
    }
    for name in set(on) & {"shuffle", "offload"}:
        on[name] = {key: value for key, value in on[name].items() if key not in ("placement", "store")}
    moved = {key: value for key, value in report["moe"].items() if key != "per_layer"}
    return {key: report[key] for key in ("nll_per_token", "perplexity", "tokens", "tokens_per_second")} | {
        "settings": on, "moe": moved,
    }  # fmt: skip


def line(name: str, row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    moe, tokens = row["moe"], row["tokens"]
    needed = moe["expert_cache_hits"] + moe["expert_cache_misses"]
    changed = sum(moe[name] for name in ("dropped", "rerouted", "remapped"))
    return [
        name,
        f"{row['perplexity']:.3f}",
        f"{100 * (row['perplexity'] / plain['perplexity'] - 1):+.2f} %" if row is not plain else "",
        f"{moe['active_experts']:.2f} of {moe['active_experts_baseline']:.2f}",
        f"{moe['max_over_mean_load']:.2f}",
        f"{100 * moe['remote_assignments'] / moe['assignments']:.1f} %",
        f"{moe['transport_bytes'] / tokens / 1024:.1f}",
        f"{100 * moe['expert_cache_hits'] / needed:.1f} %" if needed else "all resident",
        f"{moe['bytes_host_to_device'] / tokens / 1024:.1f}" if needed else "",
        f"{100 * changed / (moe['assignments'] + moe['dropped']):.1f} %",
        f"{row['tokens_per_second']:.0f}",
    ]


HEAD = (
    "techniques", "perplexity", "against plain", "experts a step reads, of plain top-k's", "max/mean load",
    "remote", "KiB between devices", "cache hits", "KiB from the host", "changed", "tokens/s",
)  # fmt: skip


def document(found: dict[str, Any]) -> str:
    rows = found["rows"]
    plain = rows["plain"]
    apart = max(abs(rows[name]["nll_per_token"] - plain["nll_per_token"]) for name in LOSSLESS)
    four = rows["all four"]["perplexity"] / plain["perplexity"] - 1
    lossy = {name: rows[name]["perplexity"] / plain["perplexity"] - 1 for name in ("binning", "capacity")}
    slots = rows["offload"]["settings"]["offload"]["slots_per_layer"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n".join([
        "# The four techniques alone and together",
        "",
        f"`{found['command']}` ({found['date']}, {found['seconds']} s on {found['machine']}; {versions})",
        "",
        f"The bundled model, its 32 experts a layer on {found['ranks']} emulated CPU devices (attention "
        f"\"tp\", transport `ragged_all_to_all`), float32. {plain['tokens']} tokens of the valid split in "
        f"the decode step, {found['batch']} sequences at a time, windows of {found['length']} tokens. "
        "Placement and profile are made of the train split. Settings of each row: `together.json`.",
        "",
        *table(HEAD, [line(name, row, plain) for name, row in rows.items()]),
        "**Experts a step reads** and **max/mean load** are means over steps and layers, the load by expert. "
        "**Remote** is the share of assignments whose expert is on another device than the token; bytes are "
        "a scored token's, over all layers. **Cache hits**: of the experts that a rank needed in a step, "
        f"those that were in its pool of {slots} slots a layer of its {32 // found['ranks']} experts. "
        "**Changed**: assignments that a lossy technique gave to another expert, or to none; one that "
        "two of them touched counts twice.",
        "",
        "**Tokens/s is no claim**: the devices are emulated on the cores of one CPU, whose memory is host "
        "and device at once, so that nothing that the techniques save costs any time here.",
        "",
        f"* The lossless ones, {' and '.join(LOSSLESS)}, differ from plain by at most {apart:.1e} nats a "
        "token: the order of sums.",
        f"* All four: {100 * four:+.2f} % perplexity, beside "
        + " and ".join(f"{100 * value:+.2f} % of {name} alone" for name, value in lossy.items())
        + ". A limit by expert works against shuffling, as the two alone show: each rank limits its own "
        "tokens, and shuffled ones want the same experts, so that more of them are moved, and to anywhere.",
        "* Near first: binning prefers, by a bin's width, experts on the token's own device and those that "
        "the device's memory holds. That makes fewer experts and more hits; what it brings near, the limit "
        "moves away again.",
        "",
    ])  # fmt: skip


def main() -> None:
    args = make_parser().parse_args()
    path = args.out / "together.json"
    if not args.document:
        path.write_text(dumps(measure(args), 3))
    (args.out / "together.md").write_text(document(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
