"""Replays recorded arrivals on ``jmoe serve``: Azure's, and Mooncake's, whose prompts begin alike.

Open loop: a request is sent when the trace says, however many run. Lengths and times are scaled to the
bundled model's context and to a small machine, as the document says. Each trace runs on a server with the
defaults, without prefix caching, and with lossy binning, whose quality is measured too.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared.origin import machine
from shared.results import few, smallest
from shared.server_process import free_port, serving

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
SMALLEST = {"max_requests": 3, "max_num_seqs": 2}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the ``traces`` part of the results."""
    args = smallest(args, SMALLEST)
    os.environ["JAX_PLATFORMS"] = "cpu"
    runs = [
        {"trace": name, "setting": setting} | replayed(args, name, setting)
        for name in list(TRACES)[few(args.dry)]
        for setting in SETTINGS
    ]
    scales = {
        name: {"file": file, "length_scale": length, "time_scale": time}
        for name, (file, length, time) in TRACES.items()
    }
    figures = {**machine(("jax",)), "model": args.model, "max_num_seqs": args.max_num_seqs}
    return figures | {"scales": scales, "runs": runs}


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
                max_requests=args.max_requests,
                quality_data=quality,
                num_warmups=4,
            )
        )
    print(f"{name}, {setting}: {report['output_throughput']:.1f} output tokens/s", flush=True)
    return {"flags": " ".join(flags)} | {key: report[key] for key in KEPT}
