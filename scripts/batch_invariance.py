"""How much a greedy answer depends on the requests that are computed in the same steps.

    python scripts/batch_invariance.py --model tiny --out docs/results

Each prompt is answered alone and together with all others, by engines of each ``--dtype``; and some are
answered once and ``--copies`` times at once. Compared are the tokens and, up to the first that differs, the
chosen tokens' log-probabilities. A step's shape decides in which order XLA and the kernels add numbers up, so
log-probabilities may differ by rounding, and tokens where two are nearly as likely.

Writes OUT/reproducibility.json and OUT/reproducibility.md, which is made from it.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from shared.document import render
from shared.origin import command_line, machine
from shared.results import table

WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on")
LENGTHS = (1, 3, 8, 20, 60, 150)  # words


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="tiny, or a directory with a tokenizer")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--copies", type=int, default=16, help="of one prompt at once")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    return parser, parser.parse_args()


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


def measure(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    from jmoe import LLM, SamplingParams

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


def answers(results: dict[str, Any]) -> str:
    """Returns the table, which has a row for each dtype and case."""
    rows = [
        [
            dtype,
            f"{case} ({results['settings'][case]})",
            f"{found['changed']} of {found['answers']}",
            f"{found['logprob']:.1e}",
        ]
        for dtype, cases in results["dtypes"].items()
        for case, found in cases.items()
    ]
    head = ["dtype", "together", "answers with another token", "log-probabilities apart by at most"]
    return table(head, rows)


def page(results: dict[str, Any]) -> str:
    template = Path(__file__).parent / "shared/reproducibility.md"
    return render(template, {"answers": answers(results), **results})


def main() -> None:
    parser, args = arguments()
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jmoe_kernels.choice import choose_kernels

    results = {
        "command": command_line(parser, args),
        **machine(("jax",)),
        "kernels": choose_kernels("cpu", "bfloat16").why,
        "model": args.model,
        "settings": {
            "prompts": args.prompts, "batch": args.batch, "copies": args.copies, "tokens": args.max_tokens,
        },
        "dtypes": {dtype: measure(args, dtype) for dtype in args.dtype},
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "reproducibility.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.out / "reproducibility.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
