"""The flags of ``jmoe bench`` and what its commands print."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, get_args

from jmoe.cli.flags import (
    Parser,
    add_command,
    add_hub_flags,
    add_json_flag,
    add_model_flags,
    found_model,
    integer,
    number,
    settings_from,
)
from jmoe.config.choices import DTypeChoice
from jmoe.config.reading import unique_json
from jmoe.tools.progress import Bars, Tenths


def add_bench(commands: Any) -> None:
    """Adds ``jmoe bench`` and its own commands."""
    text = "speed of a server (serve), or of a model in this process"
    kinds = commands.add_parser("bench", help=text, description=text).add_subparsers(
        dest="kind", required=True, metavar="KIND", parser_class=Parser
    )
    _serve_parser(add_command(kinds, "serve", run_serve, "a load on any OpenAI-compatible server"))
    throughput = add_command(kinds, "throughput", run_throughput, "tokens a second of a load, no server")
    add_model_flags(throughput)
    add_json_flag(throughput)
    throughput.add_argument(
        "--max-num-seqs", type=integer, metavar="N", help="requests decoded together at most"
    )
    _prefill_flag(throughput)
    _load_flags(throughput)
    throughput.add_argument("--num-iters", type=integer, metavar="N", default=3, help="rounds; medians count")
    latency = add_command(kinds, "latency", run_latency, "time of one batch, no server")
    add_model_flags(latency)
    add_json_flag(latency)
    _prefill_flag(latency)
    latency.add_argument("--batch-size", type=integer, metavar="B", default=8)
    latency.add_argument("--input-len", type=integer, metavar="N", default=32)
    latency.add_argument("--output-len", type=integer, metavar="N", default=128)
    latency.add_argument("--num-iters", type=integer, metavar="N", default=10)
    latency.add_argument("--seed", type=integer, metavar="N", default=0)
    _layer_parser(add_command(kinds, "moe-layer", run_moe_layer, "the routed experts of one layer alone"))


def _load_flags(p: Parser) -> None:
    p.add_argument("--trace", type=Path, metavar="F", help=".jsonl(.gz) of timestamps (ms) and lengths")
    p.add_argument("--length-scale", type=number, metavar="X", help="a trace's lengths times X")
    p.add_argument("--max-requests", type=integer, metavar="N", help="of a trace")
    p.add_argument("--max-input-len", type=integer, metavar="N", help="longer prompts are cut, and counted")
    p.add_argument("--max-output-len", type=integer, metavar="N", help="longer answers are cut, and counted")
    p.add_argument("--dataset", choices=["random"], help="without --trace: prompts of one length (default)")
    p.add_argument("--input-len", type=integer, metavar="N", help="tokens of a random prompt")
    p.add_argument("--output-len", type=integer, metavar="N", help="tokens of its answer")
    p.add_argument("--num-prompts", type=integer, metavar="N")
    p.add_argument("--seed", type=integer, metavar="N")


def _prefill_flag(p: Parser) -> None:
    p.add_argument("--max-num-batched-tokens", type=integer, metavar="N", help="longest prefill run")


def _serve_parser(p: Parser) -> None:
    p.add_argument("--base-url", metavar="URL", help="of the server (default http://127.0.0.1:8000)")
    p.add_argument("--model", dest="served_model", metavar="NAME", help="default: the server's only one")
    p.add_argument("--api-key", metavar="K")
    p.add_argument("--endpoint", choices=["completions", "chat"])
    _load_flags(p)
    p.add_argument("--time-scale", type=number, metavar="X", help="a trace's times times X; 0 = at once")
    p.add_argument(
        "--request-rate", type=number, metavar="R", help="a second; inf, the default = all at once"
    )
    p.add_argument("--burstiness", type=number, metavar="X", help="1 = Poisson; less is burstier")
    p.add_argument("--max-concurrency", type=integer, metavar="N", help="requests under way at most")
    p.add_argument("--data", type=Path, nargs="+", metavar="F", help="prompts are stretches of this text")
    p.add_argument(
        "--prompt-form", choices=["ids", "text"], help="text: words, whose tokens are the server's"
    )
    p.add_argument(
        "--vocab-size", type=integer, metavar="N", help="for token ids where there is no /tokenize"
    )
    p.add_argument("--temperature", type=number, metavar="X", help="default 0")
    p.add_argument("--no-ignore-eos", dest="ignore_eos", action="store_false", help="let answers end early")
    p.add_argument("--extra-body", type=_json_object, metavar="JSON", help="fields to add; null removes one")
    p.add_argument("--goodput", type=_goodput, metavar="L", help="ms, such as ttft:500,tpot:50,e2el:9000")
    p.add_argument("--num-warmups", type=integer, metavar="N", help="short requests before it (default 1)")
    p.add_argument("--timeout", type=number, metavar="S", help="a request (default 600)")
    p.add_argument("--save-details", type=Path, metavar="F", help="JSON with every request's times")
    p.add_argument("--quality-data", type=Path, nargs="+", metavar="F", help="what lossy settings cost on it")
    p.add_argument("--quality-tokens", type=integer, metavar="N", help="tokens to score (default 4096)")
    p.add_argument("--quality-concurrency", type=integer, metavar="N", help="of its requests (default 8)")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _layer_parser(p: Parser) -> None:
    p.add_argument("model", metavar="MODEL", nargs="?", default="tiny", help="a model or a TOML of sizes")
    add_hub_flags(p)
    p.add_argument("--batch-sizes", type=integer, nargs="+", metavar="B", default=[1, 4, 8, 16, 32, 64, 512])
    p.add_argument("--active", type=integer, nargs="+", metavar="E", default=[], help="confine experts, too")
    p.add_argument("--layers", type=integer, metavar="N", default=4, help="layers of weights taken in turn")
    p.add_argument("--num-iters", type=integer, metavar="N", default=7)
    p.add_argument("--dtype", choices=get_args(DTypeChoice), default="auto")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = unique_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


def _goodput(text: str) -> dict[str, float]:
    try:
        return {name: float(most) for name, most in (pair.split(":") for pair in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like ttft:500,tpot:50") from None


def _options(args: argparse.Namespace) -> Any:
    from jmoe.tools.bench.serve import ServeOptions

    known = {f.name for f in dataclasses.fields(ServeOptions)}
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if k in known
    }
    return ServeOptions(**fields)


def run_serve(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns 1 if a request failed."""
    from jmoe.tools.bench.report import block, notes
    from jmoe.tools.bench.serve import bench_serve

    options = _options(args)
    if sys.stderr.isatty():
        with Bars() as bars:
            report = bench_serve(options, lambda done, total: bars("bench", done, total))
    else:
        report = bench_serve(options, Tenths("requests"))
    print(json.dumps(report) if hasattr(args, "json") else "\n".join(block(report) + notes(report)))
    return 1 if report["failed"] else 0


def run_throughput(args: argparse.Namespace) -> int:
    from jmoe.tools.bench.loads import LengthLimits
    from jmoe.tools.bench.offline import bench_throughput

    options = _options(args)
    settings, model = settings_from(vars(args)), found_model(vars(args))
    with Bars() as bars:
        report = bench_throughput(
            model.path,
            settings,
            options.load(),
            LengthLimits(options.max_input_len, options.max_output_len),
            args.num_iters,
            options.seed,
            bars,
        )
    report |= model.report
    if hasattr(args, "json"):
        print(json.dumps(report))
        return 0
    print(
        f"Throughput: {report['requests_per_second']:.2f} requests/s, "
        f"{report['tokens_per_second']:.2f} total tokens/s, "
        f"{report['output_tokens_per_second']:.2f} output tokens/s\n"
        f"{report['requests']} requests, {report['input_tokens']} prompt and {report['output_tokens']} "
        f"output tokens; medians of {report['iterations']} rounds"
    )
    taken = report["clipped"]
    if any(taken.values()):
        print(f"clipped: {taken['input_tokens']} prompt and {taken['output_tokens']} output tokens")
    return 0


def run_latency(args: argparse.Namespace) -> int:
    from jmoe.tools.bench.loads import synthetic
    from jmoe.tools.bench.offline import bench_latency

    load = synthetic(args.batch_size, args.input_len, args.output_len, float("inf"), 1.0, 0)
    settings = settings_from(vars(args) | {"max_num_seqs": args.batch_size})
    model = found_model(vars(args))
    with Bars() as bars:
        report = bench_latency(model.path, settings, load, args.num_iters, args.seed, bars)
    report |= {"input_len": args.input_len, "output_len": args.output_len} | model.report
    if hasattr(args, "json"):
        print(json.dumps(report))
        return 0
    print(f"batch {args.batch_size}, {args.input_len} prompt and {args.output_len} output tokens")
    for name, title in (
        ("latency", "whole batch"),
        ("prefill", "to the first tokens"),
        ("per_token", "between tokens"),
    ):
        median, p99 = report[f"{name}_median_ms"], report[f"{name}_p99_ms"]
        if median is not None:
            print(f"{title + ':':<22} median {median:.2f} ms, P99 {p99:.2f} ms")
    return 0


def run_moe_layer(args: argparse.Namespace) -> int:
    from jmoe.tools.bench.moe_layer import bench_moe_layer

    is_file = args.model.endswith(".toml")
    model = None if is_file else found_model(vars(args), weights=False)
    with Bars() as bars:
        report = bench_moe_layer(
            args.model if model is None else model.files,
            batch_sizes=args.batch_sizes,
            active=args.active,
            layers=args.layers,
            iterations=args.num_iters,
            dtype=args.dtype,
            progress=bars,
        )
    report |= {"model": args.model} | ({} if model is None else model.report)
    if hasattr(args, "json"):
        print(json.dumps(report))
        return 0
    print(
        f"{report['experts']} experts of {report['expert_bytes'] / 1e6:.2f} MB, top "
        f"{report['experts_per_token']}, {report['dtype']}; kernel: {report['kernel']} ({report['why']})"
    )
    print(f"{'tokens':>8}{'active':>8}{'ms':>10}{'GB/s':>8}{'Gflop/s':>9}")
    for row in report["rows"]:
        print(
            f"{row['tokens']:>8}{row['active_experts']:>8}{row['ms']:>10.3f}{row['gb_per_s']:>8.1f}"
            f"{row['gflop_per_s']:>9.1f}"
        )
    return 0
