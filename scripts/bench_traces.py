"""Replays recorded arrivals on ``jmoe serve``: Azure's, and Mooncake's, whose prompts begin alike.

    python scripts/bench_traces.py --data ../shared/data

Open loop: a request is sent when the trace says, however many run. Lengths and times are scaled to the
bundled model's context and to a small machine, as the page tells. Each trace runs on a server with the
defaults, without prefix caching, and with lossy binning, whose quality is measured too.

Writes the part "traces" of docs/results/serving.json, and serving.md; run it on an otherwise idle machine.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_serving import free_port, serving
from shared.origin import command_line, machine
from shared.serving_report import write_part

from jmoe.tools.bench.serve import ServeOptions, bench_serve

# the file, the length scale, the time scale: prompts have about 300 and 700 tokens, 8 or so arrive a second
TRACES = {
    "azure": ("azure_llm_2023_conv.jsonl.gz", 1 / 4, 1 / 2),
    "mooncake": ("mooncake_conversation.jsonl.gz", 1 / 16, 1 / 3),
}
SETTINGS = {
    "as it comes": [],
    "no prefix caching": ["--no-enable-prefix-caching"],
    "binning": ["--moe-config", '{"binning": {"bin_width": 0.5}}'],
}
KEPT = (
    "completed", "failed", "duration", "total_input_tokens", "total_output_tokens", "output_throughput",
    "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_itl_ms",
    "p99_itl_ms", "median_e2el_ms", "max_concurrent_requests", "prefix_hit_rate", "moe", "quality", "clipped",
)  # fmt: skip


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of workloads/ and valid/")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--requests", type=int, default=300, help="of each trace")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the results")
    return parser, parser.parse_args()


def replayed(args: argparse.Namespace, name: str, setting: str) -> dict[str, Any]:
    """Replays one trace on a fresh server and returns what its clients saw."""
    file, length, time = TRACES[name]
    port, flags = free_port(), SETTINGS[setting]
    words = [sys.executable, "-m", "jmoe.cli", "serve", args.model, "--port", str(port)]
    words += ["--max-num-seqs", str(args.max_num_seqs), *flags]
    quality = tuple(sorted((args.data / "valid").iterdir())) if setting == "binning" else ()
    with (
        tempfile.TemporaryDirectory() as logs,
        serving(words, port, Path(logs) / "jmoe.log", model=args.model, extra={}) as served,
    ):
        report = bench_serve(
            ServeOptions(
                base_url=served.url,
                trace=args.data / "workloads" / file,
                length_scale=length,
                time_scale=time,
                max_requests=args.requests,
                quality_data=quality,
                num_warmups=4,
            )
        )
    print(f"{name}, {setting}: {report['output_throughput']:.1f} output tokens/s", flush=True)
    return {"flags": " ".join(flags)} | {key: report[key] for key in KEPT}


def main() -> None:
    parser, args = arguments()
    os.environ["JAX_PLATFORMS"] = "cpu"
    runs = [
        {"trace": name, "setting": setting} | replayed(args, name, setting)
        for name in TRACES
        for setting in SETTINGS
    ]
    scales = {
        name: {"file": file, "length_scale": length, "time_scale": time}
        for name, (file, length, time) in TRACES.items()
    }
    figures = {"command": command_line(parser, args), **machine(("jax",)), "model": args.model}
    figures |= {"max_num_seqs": args.max_num_seqs, "scales": scales, "runs": runs}
    write_part(args.out, "traces", figures)


if __name__ == "__main__":
    main()
