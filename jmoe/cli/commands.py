"""The commands that read or make files and print: their flags, calls and output."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from jmoe.cli.flags import (
    add_chat_flags,
    add_command,
    add_hub_flags,
    add_json_flag,
    add_model_flags,
    add_quantization_flags,
    found_model,
    integer,
    number,
    settings_from,
)
from jmoe.config.choices import DTypeChoice
from jmoe.placement.methods import DEFAULT, MethodName
from jmoe.tools.progress import Bars


def add_generate(commands: Any) -> None:
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


def add_eval(commands: Any) -> None:
    p = add_command(commands, "eval", run_eval, "perplexity on text, and what the experts did")
    add_model_flags(p)
    add_json_flag(p)
    p.add_argument("--data", type=Path, nargs="+", required=True, metavar="F")
    p.add_argument("--mode", choices=["prefill", "decode"], default="prefill")
    p.add_argument("--batch-size", type=integer, metavar="B", default=8)
    p.add_argument("--max-tokens", type=integer, metavar="N", default=None, help="tokens to score at most")


def add_profile(commands: Any) -> None:
    p = add_command(commands, "profile", run_profile, "routing statistics on text, for place")
    add_model_flags(p)
    add_json_flag(p)
    p.add_argument("--data", type=Path, nargs="+", required=True, metavar="F")
    p.add_argument("--out", type=Path, required=True, metavar="PROFILE")
    p.add_argument("--batch-size", type=integer, metavar="B", default=8)
    p.add_argument("--max-tokens", type=integer, metavar="N", default=None, help="tokens to count at most")


def add_place(commands: Any) -> None:
    p = add_command(commands, "place", run_place, "which device holds which experts, from a profile")
    p.add_argument("profile", metavar="PROFILE", type=Path)
    p.add_argument("--devices", type=integer, required=True, metavar="N")
    p.add_argument("--out", type=Path, required=True, metavar="PLACEMENT")
    baselines = ", ".join(name for name in get_args(MethodName) if name != DEFAULT)
    method = f"{DEFAULT} (the default), or a baseline: {baselines}"
    p.add_argument("--method", metavar="M", default=DEFAULT, help=method)
    p.add_argument("--seed", type=integer, metavar="N", default=0)
    p.add_argument("--json", action="store_true", help="print one JSON object")


def add_doctor(commands: Any) -> None:
    p = add_command(commands, "doctor", run_doctor, "devices, memory, chosen kernels and layouts, and why")
    add_model_flags(p)
    add_chat_flags(p)
    add_json_flag(p)


def add_convert(commands: Any) -> None:
    p = add_command(commands, "convert", run_convert, "HF safetensors -> sharded Orbax checkpoint")
    p.add_argument("hf_dir", metavar="HF_DIR", help="a directory, or ORG/NAME of the Hugging Face Hub")
    add_hub_flags(p)
    p.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    p.add_argument("--dtype", choices=get_args(DTypeChoice), default="auto")
    add_quantization_flags(p)


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
    # few shapes: a command that runs once mostly waits for the start
    shapes = {"max_num_seqs": min(len(prompts), 32), "max_num_batched_tokens": 256}
    settings = settings_from(vars(args) | shapes)
    model = found_model(vars(args))
    with Bars() as bars:
        if not hasattr(args, "json"):
            print_streamed(model.path, settings, prompts, params, bars, sys.stdout)
            return 0
        report = generate(model.path, settings, prompts, params, bars)
    print(json.dumps(report | model.report))
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Returns prompts from the flag, the lines of the file, or standard input as one prompt."""
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

    settings, model = settings_from(vars(args)), found_model(vars(args))
    with Bars() as bars:
        report = evaluate(
            model.path,
            args.data,
            mode=args.mode,
            batch_size=args.batch_size,
            max_tokens=args.max_tokens,
            settings=settings,
            progress=bars,
        )
    report |= model.report
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

    settings, model = settings_from(vars(args)), found_model(vars(args))
    with Bars() as bars:
        report = profile(
            model.path,
            args.data,
            args.out,
            batch_size=args.batch_size,
            max_tokens=args.max_tokens,
            settings=settings,
            progress=bars,
        )
    report |= model.report
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
    from jmoe.checkpoint.quantised.codings import Quantize

    method = getattr(args, "quantization", None)
    quantize = method and Quantize(method, getattr(args, "quantize", "all"))
    model = found_model({**vars(args), "model": args.hf_dir})
    convert(model.path, args.out_dir, dtype=args.dtype, quantize=quantize)
    print(f"wrote {args.out_dir}")
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from jmoe.tools.doctor import doctor, lines

    chat = {name: value for name, value in vars(args).items() if name in ("chat_template", "tool_format")}
    settings, model = settings_from(vars(args)), found_model(vars(args), weights=False)
    report = doctor(model.files, settings, **chat) | model.report
    print(json.dumps(report) if hasattr(args, "json") else "\n".join(lines(report)))
    return 0
