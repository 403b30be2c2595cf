"""Serving on a CPU: other servers on the same machine, recorded arrivals, the host's share of a step.

Parts: transformers (``transformers serve`` with continuous batching) and vllm (``vllm serve``), each of which
takes turns with ``jmoe serve``; traces (recorded arrivals on ``jmoe serve``); host (what the host takes of a
decode step); tools (what tools cost an answer that is plain text). All of them need an idle machine.
"""

import argparse
from pathlib import Path

from studies.record import OLMOE, Part, Results, Study, at_least

DTYPES = ("auto", "float32", "bfloat16")
COMPARED = (  # the options of a comparison with a peer
    "model", "dtype", "rounds", "concurrency", "requests", "input_len", "output_len", "prefill_len",
    "prompt_text", "jmoe_options", "peer_options",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    size = at_least(1)
    add = parser.add_argument
    add("--model", default="tiny", help="transformers, vllm, traces: tiny, or a Hugging Face directory")
    add("--sizes", type=Path, default=OLMOE, help="host: of the random model; or tiny, or a directory")
    add("--dtype", choices=DTYPES, default="auto", help="transformers, vllm, host: of the weights")
    add("--rounds", type=size, default=5, help="transformers, vllm, host, tools: paired rounds")
    add("--concurrency", type=size, nargs="+", default=[32], help="transformers, vllm: a row each")
    add("--requests", type=size, help="transformers, vllm: of a round; by default 4 times the concurrency")
    add("--input-len", type=size, default=64, help="transformers, vllm: words of a prompt")
    add("--output-len", type=at_least(2), default=64, help="transformers, vllm, tools: tokens of an answer")
    add(
        "--prefill-len",
        type=size,
        help="transformers, vllm: words of a prompt of one more row, one at a time",
    )
    add("--prompt-text", type=Path, nargs="*", default=[], help="transformers, vllm: prompts are cut from it")
    add("--jmoe-options", default="", help="transformers, vllm: further flags of jmoe serve, in one word")
    add("--peer-options", default="", help="transformers, vllm: further flags of the peer, in one word")
    add("--peer-command", help="the peer's program, if it is not on the path")
    add("--max-requests", type=size, default=300, help="traces: of each trace")
    add("--max-num-seqs", type=size, default=32, help="traces: of the server")
    add("--batch", type=size, default=32, help="host: requests that decode together")
    add("--context", type=size, default=64, help="host: tokens of each prompt")
    add("--new", type=at_least(4), default=64, help="host: steps of the whole batch")


def transformers(args: argparse.Namespace, results: Results) -> Results | None:
    from studies.serving.transformers import measure

    return measure(args)


def vllm(args: argparse.Namespace, results: Results) -> Results | None:
    from studies.serving.vllm import measure

    return measure(args)


def traces(args: argparse.Namespace, results: Results) -> Results:
    from studies.serving.traces import measure

    return measure(args)


def host(args: argparse.Namespace, results: Results) -> Results:
    from studies.serving.host import measure

    return measure(args)


def tools(args: argparse.Namespace, results: Results) -> Results:
    from studies.serving.tools import measure

    return measure(args)


STUDY = Study(
    "serving",
    __doc__ or "",
    (
        Part("transformers", transformers, "", COMPARED),
        Part("vllm", vllm, "", COMPARED),
        Part("traces", traces, "workloads", ("model", "max_requests", "max_num_seqs")),
        Part("host", host, "", ("sizes", "dtype", "rounds", "batch", "context", "new")),
        Part("tools", tools, "valid", ("rounds", "output_len")),
    ),
    add_options,
    ("tables",),
    has_plots=False,
    local_options=("peer_command",),
)
