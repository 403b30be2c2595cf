"""The command line: parses, calls ``jmoe.tools`` or the server, prints. Heavy imports wait for their command.

Exit code 0 on success, 2 with one line on standard error for a usage or input error.
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jmoe import __version__
from jmoe.cli.bench import add_bench
from jmoe.cli.flags import (
    Parser,
    add_command,
    add_json_flag,
    add_model_flags,
    add_serve_flags,
    given_settings,
    integer,
    number,
    read_serve_config,
    settings_from,
    size,
)
from jmoe.faults import interrupt_ends_at_once
from jmoe.tools.progress import Bars

if TYPE_CHECKING:
    from jmoe.engine.processes.nodes import Nodes

__all__ = ["main", "parser", "read_serve_config", "size"]
NODE_FLAGS = ("nnodes", "node_rank", "dist_init_addr")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return reported(lambda: args.run(args))


def reported(run: Callable[[], int]) -> int:
    """The exit code of ``run``; a bad input is told in one line."""
    try:
        return run()
    except (ValueError, OSError) as error:
        print("jmoe: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> Parser:
    top = Parser(prog="jmoe", description="Serves Mixture-of-Experts language models.")
    top.add_argument("--version", action="version", version=f"jmoe {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    serve = add_command(commands, "serve", run_serve, "an OpenAI-compatible server")
    add_model_flags(serve)
    add_serve_flags(serve)
    _generate_parser(commands)
    _eval_parser(commands)
    _profile_parser(commands)
    _place_parser(commands)
    add_bench(commands)
    doctor = add_command(
        commands, "doctor", run_doctor, "devices, memory, chosen kernels and layouts, and why"
    )
    add_model_flags(doctor)
    add_json_flag(doctor)
    convert = add_command(commands, "convert", run_convert, "HF safetensors -> sharded Orbax checkpoint")
    convert.add_argument("hf_dir", metavar="HF_DIR", type=Path)
    convert.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    convert.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    return top


def _generate_parser(commands: Any) -> None:
    p = add_command(commands, "generate", run_generate, "continue prompts and print the completions")
    add_model_flags(p)
    add_json_flag(p)
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompts-file", type=Path, metavar="F", help="one prompt a line")
    length = "tokens to generate at most (default: 128, or fewer where the context ends)"
    p.add_argument("--max-tokens", type=integer, metavar="N", default=None, help=length)
    p.add_argument("--temperature", type=number, metavar="X", default=1.0)
    p.add_argument("--top-p", type=number, metavar="X", default=1.0)
    p.add_argument("--top-k", type=integer, metavar="N", default=0)
    p.add_argument("--seed", type=integer, metavar="N", default=None)


def _eval_parser(commands: Any) -> None:
    p = add_command(commands, "eval", run_eval, "perplexity on text, and what the experts did")
    add_model_flags(p)
    add_json_flag(p)
    p.add_argument("--data", type=Path, nargs="+", required=True, metavar="F")
    p.add_argument("--mode", choices=["prefill", "decode"], default="prefill")
    p.add_argument("--batch-size", type=integer, metavar="B", default=8)
    p.add_argument("--max-tokens", type=integer, metavar="N", default=None, help="tokens to score at most")


def _profile_parser(commands: Any) -> None:
    p = add_command(commands, "profile", run_profile, "routing statistics on text, for place")
    add_model_flags(p)
    add_json_flag(p)
    p.add_argument("--data", type=Path, nargs="+", required=True, metavar="F")
    p.add_argument("--out", type=Path, required=True, metavar="PROFILE")
    p.add_argument("--batch-size", type=integer, metavar="B", default=8)
    p.add_argument("--max-tokens", type=integer, metavar="N", default=None, help="tokens to count at most")


def _place_parser(commands: Any) -> None:
    p = add_command(commands, "place", run_place, "which device holds which experts, from a profile")
    p.add_argument("profile", metavar="PROFILE", type=Path)
    p.add_argument("--devices", type=integer, required=True, metavar="N")
    p.add_argument("--out", type=Path, required=True, metavar="PLACEMENT")
    p.add_argument(
        "--method",
        metavar="M",
        default="alternating",
        help="alternating (the default), cross_entropy, exflow, moetuner, load, uniform or random",
    )
    p.add_argument("--seed", type=integer, metavar="N", default=0)
    p.add_argument("--json", action="store_true", help="print one JSON object")


@interrupt_ends_at_once()
def run_serve(args: argparse.Namespace) -> int:
    from jmoe.engine.processes.nodes import Nodes, leave
    from jmoe.server.run import without_threads
    from jmoe.server.watch.logs import configure

    values = vars(args) | {}
    if "config" in values:
        values = read_serve_config(values["config"]) | values
    configure(values.get("log_format", "text"), values.get("log_level", "info"))
    nodes = Nodes(**{k: values[k] for k in NODE_FLAGS if k in values})
    if nodes.nnodes == 1:
        return without_threads(serve_model(values))
    run = follow_leader if nodes.rank else serve_model
    return without_threads(leave(reported(lambda: run(values, nodes))))


def serve_model(values: dict[str, Any], nodes: "Nodes | None" = None) -> int:
    """Serves over HTTP, with the devices of all of ``nodes``; the exit code."""
    import logging

    from jmoe.engine.build import build_engine
    from jmoe.engine.deployment.settings import model_directory
    from jmoe.engine.processes.lockstep import lead
    from jmoe.engine.request import EngineDead
    from jmoe.engine.worker import EngineWorker
    from jmoe.server.run import ServerSettings, bind, serve

    log = logging.getLogger(__name__)
    log.info("jmoe %s, settings given: %s", __version__, given_settings(values))
    server = ServerSettings(**{f.name: values[f.name] for f in fields(ServerSettings) if f.name in values})
    tracer = make_tracer(values, server.served_model_name)
    socket = bind(server.host, server.port)  # before the model: a port in use shows at once
    settings, model = settings_from(values), values.get("model", "tiny")
    try:
        with Bars() as bars:
            engine = lead(nodes, model, settings, bars) if nodes else build_engine(model, settings, bars)
    except EngineDead as error:
        log.error("the model was not started: %s", error)
        return 1
    kernels = engine.runner.kernels
    log.info("expert kernels: %s (%s)", kernels.experts, kernels.why)
    if engine.runner.lossy:
        on = filter(None, (settings.moe.binning, settings.moe.capacity))
        log.info("lossy techniques are on: %s", ", then ".join(map(str, on)))
    log.info("paged attention: %s (%s)", kernels.attention, kernels.why_attention)
    worker = EngineWorker(engine)
    worker.start()
    try:
        return serve(worker, server, socket, model_directory(model), model, [tracer] if tracer else [])
    finally:
        if tracer:
            tracer.close()
        if engine.runner.alive:  # else a step may never end
            worker.close()


def make_tracer(values: dict[str, Any], served_model_name: str | None) -> Any:
    """The observer that sends spans, None where no endpoint was given."""
    if "otlp_traces_endpoint" not in values:
        return None
    try:
        from jmoe.server.watch.tracing import Tracer, exporting_to
    except ImportError:
        raise ValueError("--otlp-traces-endpoint needs the otel extra: pip install 'jmoe[otel]'") from None
    model = served_model_name or values.get("model", "tiny")
    return Tracer(exporting_to(values["otlp_traces_endpoint"]), model)


def follow_leader(values: dict[str, Any], nodes: "Nodes") -> int:
    """Serves no HTTP and ends with process 0: 0, or 1 where that ends without a word."""
    import logging

    from jmoe.engine.processes.lockstep import follow
    from jmoe.engine.request import EngineDead

    log = logging.getLogger(__name__)

    def leave_it_to_the_leader(number: int, frame: Any) -> None:
        """Process 0, told to end too, first finishes running answers, and needs this one for it."""
        signal.signal(number, signal.SIG_DFL)
        log.info("process %d ends with process 0; a second signal ends it at once", nodes.rank)

    def ready(runner: Any) -> None:
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN:  # nohup's
                signal.signal(each, leave_it_to_the_leader)

    try:
        with Bars() as bars:
            follow(nodes, values.get("model", "tiny"), settings_from(values), bars, ready)
    except EngineDead as error:
        log.error("process %d ends without process 0: %s", nodes.rank, error)
        return 1
    return 0


def run_generate(args: argparse.Namespace) -> int:
    from jmoe.engine.request import SamplingParams
    from jmoe.tools.generate import generate, print_streamed

    prompts = read_prompts(args)
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
    )
    # few shapes: a command that runs once mostly waits for its start
    shapes = {"max_num_seqs": min(len(prompts), 32), "max_num_batched_tokens": 256}
    settings = settings_from(vars(args) | shapes)
    model = getattr(args, "model", "tiny")
    with Bars() as bars:
        if not hasattr(args, "json"):
            print_streamed(model, settings, prompts, params, bars, sys.stdout)
            return 0
        report = generate(model, settings, prompts, params, bars)
    print(json.dumps(report))
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts from the flag, the lines of the file, or standard input as one prompt."""
    if hasattr(args, "prompt"):
        return [args.prompt]
    try:
        if hasattr(args, "prompts_file"):
            text = args.prompts_file.read_text(encoding="utf-8")
            prompts = [line for line in text.splitlines() if line]
            if not prompts:
                raise ValueError(f"{args.prompts_file} holds no prompt; it takes one a line")
            return prompts
        prompt = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8: {error.reason} at byte {error.start}") from None
    if not prompt:
        raise ValueError("no prompt: give --prompt, --prompts-file or text on standard input")
    return [prompt]


def run_eval(args: argparse.Namespace) -> int:
    from jmoe.tools.evaluate import evaluate

    with Bars() as bars:
        report = evaluate(
            getattr(args, "model", "tiny"),
            args.data,
            mode=args.mode,
            batch_size=args.batch_size,
            max_tokens=args.max_tokens,
            settings=settings_from(vars(args)),
            loading=bars,
            progress=bars.count("score"),
        )
    if hasattr(args, "json"):
        print(json.dumps(report))
    else:
        moe = report["moe"]
        print(
            f"perplexity {report['perplexity']:.4f} over {report['tokens']} tokens "
            f"({report['tokens_per_second']:.0f} tokens/s); {moe['active_experts']:.1f} active experts "
            f"a step, max/mean load {moe['max_over_mean_load']:.2f}"
        )
    return 0


def run_profile(args: argparse.Namespace) -> int:
    from jmoe.tools.profile import profile

    with Bars() as bars:
        report = profile(
            getattr(args, "model", "tiny"),
            args.data,
            args.out,
            batch_size=args.batch_size,
            max_tokens=args.max_tokens,
            settings=settings_from(vars(args)),
            loading=bars,
            progress=bars.count("profile"),
        )
    if hasattr(args, "json"):
        print(json.dumps(report))
    else:
        print(f"wrote {args.out}: {report['tokens']} tokens in {report['windows']} windows")
    return 0


def run_place(args: argparse.Namespace) -> int:
    from jmoe.tools.place import place

    with Bars() as bars:
        report = place(args.profile, args.devices, args.out, args.method, args.seed, bars)
    if hasattr(args, "json"):
        print(json.dumps(report))
    else:
        print(
            f"wrote {args.out}: {report['remote']:.1%} of the profile's activations remote (without a word "
            f"from the tokens: {1 - 1 / args.devices:.1%}), max/mean load {report['max_over_mean_load']:.2f}"
        )
    return 0


def run_convert(args: argparse.Namespace) -> int:
    from jmoe.checkpoint import convert

    convert(args.hf_dir, args.out_dir, dtype=args.dtype)
    print(f"wrote {args.out_dir}")
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from jmoe.tools.doctor import doctor, lines

    report = doctor(getattr(args, "model", "tiny"), settings_from(vars(args)))
    print(json.dumps(report) if hasattr(args, "json") else "\n".join(lines(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
