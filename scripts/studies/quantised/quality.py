"""Measures the part quality: the bundled model's perplexity on text in every form, by the engine's own steps.

Each form is an engine of its own that scores the same windows as prompts (``prompt_logprobs``). The change of
perplexity is paired with bfloat16 window by window.
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from shared.origin import machine
from shared.results import perplexity_change, smallest
from shared.teacher_forcing import read_windows
from shared.text_routing import domains_of
from studies.quantised.checkpoints import FP8_BLOCKS, INT4_32, INT4_128, Stored, write_quantised

from jmoe import LLM
from jmoe.engine.deployment.settings import model_directory
from jmoe.engine.request import SamplingParams

PLAIN = "bfloat16"
SMALLEST = {"tokens": 64, "length": 32, "forms": [PLAIN, "int4, 128", "KV int8"]}
SCORED = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)


class Form(NamedTuple):
    """A form of weights or of the cache.

    made: how the checkpoint or the engine makes it, for the table.
    options: options of ``LLM``.
    stored: form in which the checkpoint is written first; None takes the plain one.
    """

    made: str
    options: dict[str, Any]
    stored: Stored | None = None


A8 = {"activation_dtype": "int8"}
WEIGHTS = {
    "int8": Form("--quantization int8", {"quantization": "int8"}),
    "fp8, rows": Form("--quantization fp8", {"quantization": "fp8"}),
    "fp8, 128 x 128": Form("checkpoint, fp8", {}, FP8_BLOCKS),
    "int4, 32, lows": Form("--quantization int4", {"quantization": "int4"}),
    "int4, 32": Form("checkpoint, pack-quantized", {}, INT4_32),
    "int4, 128": Form("checkpoint, pack-quantized", {}, INT4_128),
    "MXFP4": Form("--quantization mxfp4", {"quantization": "mxfp4"}),
}
CACHES = {
    "KV int8": Form("--kv-cache-dtype int8", {"kv_cache_dtype": "int8"}),
    "KV fp8": Form("--kv-cache-dtype fp8", {"kv_cache_dtype": "fp8"}),
}
FORMS = {
    PLAIN: Form("", {}),
    **{name + end: form._replace(options=form.options | more)
       for name, form in WEIGHTS.items() for end, more in (("", {}), (", A8", A8))},
    **CACHES,
}  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the part of the results."""
    args, start = smallest(args, SMALLEST), time.perf_counter()
    names = args.forms or list(FORMS)
    if unknown := set(names) - set(FORMS):
        raise SystemExit(f"--forms: {min(unknown)!r} is none of {', '.join(FORMS)}")
    domains = domains_of(args.data / "valid")
    count = max(1, args.tokens // args.length)
    windows_NL = read_windows(args.model, args.data / "valid", domains, count, args.length)
    plain_N, rows = losses(args.model, FORMS[PLAIN], windows_NL), {}
    for name in names:
        nll_N = plain_N if name == PLAIN else losses(args.model, FORMS[name], windows_NL)
        change, error = perplexity_change(nll_N - plain_N, len(domains))
        rows[name] = {
            "made": FORMS[name].made, "nll": float(nll_N.mean()), "change_percent": change,
            "error_percent": error,
        }  # fmt: skip
        print(f"{name}: {change:+.4f} % +- {error:.4f}", flush=True)
    return {
        **machine(("jax",)),
        "seconds": round(time.perf_counter() - start),
        "model": args.model,
        "domains": len(domains),
        "windows": len(windows_NL),
        "length": args.length,
        "forms": rows,
    }


def losses(model: str, form: Form, windows_NL: Int[np.ndarray, "N L"]) -> Float[np.ndarray, " N"]:
    """Returns the mean loss of each window in a form, in nats a token."""
    with ExitStack() as stack:
        directory = model_directory(model)
        if form.stored is not None:
            plain, directory = directory, Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_quantised(plain, directory, form.stored)
        settings = {"max_model_len": windows_NL.shape[1], "max_num_seqs": 8, "enable_prefix_caching": False}
        llm = stack.enter_context(LLM(directory, dtype="bfloat16", warm_up=False, **settings, **form.options))
        found = llm.generate(windows_NL.tolist(), SCORED)
    scores = [[token.logprob for token in each.prompt_logprobs or () if token] for each in found]
    return -np.array(scores, np.float64).mean(axis=1)
