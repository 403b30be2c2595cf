"""Measures how much a greedy answer depends on the requests that are computed in the same steps.

Each prompt is answered alone and together with all others, by engines of each dtype; and some are answered
once and several times at once. Compared are the tokens and, up to the first that differs, the chosen tokens'
log-probabilities. A step's shape decides in which order XLA and the kernels add numbers up, so
log-probabilities may differ by rounding, and tokens if two are nearly as likely.
"""

import argparse
import random
from typing import Any

from jmoe_kernels.choice import choose_kernels
from shared.origin import machine
from shared.results import smallest

from jmoe import LLM, SamplingParams

WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on")
LENGTHS = (1, 3, 8, 20, 60, 150)  # words
SMALLEST = {"prompts": 2, "max_tokens": 2, "copies": 2}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of the study."""
    args = smallest(args, SMALLEST)
    return {
        **machine(("jax",)),
        "kernels": choose_kernels("cpu", "bfloat16").why_experts,
        "model": args.model,
        "settings": {
            "prompts": args.prompts, "batch": args.batch, "copies": args.copies, "tokens": args.max_tokens,
        },
        "dtypes": {dtype: measure_dtype(args, dtype) for dtype in args.dtype},
    }  # fmt: skip


def measure_dtype(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(WORDS, k=LENGTHS[i % len(LENGTHS)])) for i in range(args.prompts)]
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.0, ignore_eos=True, logprobs=0)
    with LLM(args.model, dtype=dtype, max_num_seqs=args.batch, enable_prefix_caching=False) as llm:

        def answers(texts: list[str]) -> list[Any]:
            return [output.outputs[0] for output in llm.generate(texts, params)]

        alone = [answers([prompt])[0] for prompt in prompts]
        copies = [answers([prompt] * args.copies) for prompt in prompts[: len(LENGTHS)]]
        return {
            "batch": compare(alone, answers(prompts)),
            "copies": compare(
                [a for a in alone[: len(copies)] for _ in range(args.copies)],
                [a for of_one in copies for a in of_one],
            ),
        }


def compare(singles: list[Any], batched: list[Any]) -> dict[str, Any]:
    """Returns how many answers differ, and the largest difference of log-probabilities before they differ."""
    changed, worst = 0, 0.0
    for a, b in zip(singles, batched, strict=True):
        same = next(
            (i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y),
            len(a.token_ids),
        )
        changed += same < len(a.token_ids)
        apart = (
            abs(x.logprob - y.logprob) for x, y in zip(a.logprobs[:same], b.logprobs[:same], strict=True)
        )
        worst = max(worst, *apart, 0.0)
    return {"answers": len(singles), "changed": changed, "logprob": worst}
