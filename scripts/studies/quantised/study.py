"""Quantised weights on a CPU: speed, quality, memory and start, beside bfloat16 and other engines.

Parts: speed (whole model beside llama.cpp, for the cores of --threads), vllm (servers), streaming (the
experts' kernel alone), quality (perplexity of the bundled model), loading (bytes on a rank, by shapes), start
(of the server). All but quality and loading need an idle machine.
"""

import argparse
from pathlib import Path

from studies.record import OLMOE, Part, Results, Study, at_least


def add_options(parser: argparse.ArgumentParser) -> None:
    size = at_least(1)
    add = parser.add_argument
    add("--sizes", type=Path, default=OLMOE, help="speed, vllm, streaming, start: of the random model")
    add("--rounds", type=size, default=3, help="speed, vllm, start: paired rounds")
    add("--prompt", type=size, default=512, help="speed, vllm: tokens of the prefill row's prompt")
    add("--context", type=size, default=16, help="speed, vllm: tokens of a prompt that is decoded")
    add("--new", type=at_least(2), default=32, help="speed, vllm: tokens that are decoded")
    add("--batches", type=size, nargs="+", default=[1, 8, 32], help="speed, vllm: decode rows")
    types = "speed: llama.cpp's types of files; none leaves it out"
    add("--types", nargs="*", default=["bf16", "q8_0", "q4_0", "q4_K_M"], help=types)
    add("--served", nargs="+", choices=("bfloat16", "int8"), default=["bfloat16", "int8"], help="vllm: forms")
    add("--seconds", type=float, default=1.0, help="streaming: time of a measurement")
    add("--model", default="tiny", help="quality: the model")
    add("--tokens", type=size, default=4096, help="quality: tokens scored in a domain")
    add("--length", type=at_least(2), default=256, help="quality: tokens of a window")
    add("--forms", nargs="+", help="quality: names of forms; by default all")
    add("--llama-python", help="the interpreter with llama_cpp and gguf")
    add("--vllm-command", default="vllm", help="vLLM's program")


def speed(args: argparse.Namespace, results: Results) -> Results:
    from studies.quantised.speed import measure

    return measure(args, results.get("speed", {}))


def vllm(args: argparse.Namespace, results: Results) -> Results | None:
    from studies.quantised.vllm import measure

    return measure(args)


def streaming(args: argparse.Namespace, results: Results) -> Results:
    from studies.quantised.streaming import measure

    return measure(args, results.get("streaming", {}))


def quality(args: argparse.Namespace, results: Results) -> Results:
    from studies.quantised.quality import measure

    return measure(args)


def loading(args: argparse.Namespace, results: Results) -> Results:
    import jax
    from studies.quantised.loading import RANKS, measure

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(RANKS))
    return measure()


def start(args: argparse.Namespace, results: Results) -> Results:
    from studies.quantised.start import measure

    return measure(args)


STUDY = Study(
    "quantised",
    __doc__ or "",
    (
        Part("speed", speed, "", ("sizes", "rounds", "prompt", "context", "new", "batches", "types")),
        Part("vllm", vllm, "", ("sizes", "rounds", "prompt", "context", "new", "batches", "served")),
        Part("streaming", streaming, "", ("sizes", "seconds")),
        Part("quality", quality, "valid", ("model", "tokens", "length", "forms")),
        Part("loading", loading),
        Part("start", start, "", ("sizes", "rounds")),
    ),
    add_options,
    ("tables", "targets"),
    has_plots=False,
    depth=3,
    local_options=("llama_python", "vllm_command"),
)
