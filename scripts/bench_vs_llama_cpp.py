"""Compares jmoe's speed with llama.cpp's on an OLMoE model: same CPU, weights (bfloat16), prompts and tokens.

    python3 -m venv PEER
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \\
      PEER/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf==0.19.0
    python scripts/bench_vs_llama_cpp.py --llama-python PEER/bin/python --threads 2 --json OUT

Built from source, llama.cpp uses all that this CPU has; the table names the instructions it was built with.
Its weights are the same ones in its own file format, bfloat16 except norms and router (float32), read as it
reads them by default, with its default settings (flash attention as it chooses, a float16 cache).

Before anything is timed, the two models' logits after several prompts are compared; if they differ by
more than bfloat16 rounding does, the script reports it and ends.

Rows: prefill of a long prompt, and decoding at several batch sizes, as ``bench_vs_transformers.py`` has them
(``shared.protocol``): jmoe and llama.cpp, each in its process on the same cores, run strictly in turn in
opposite order every other round, and the ratio jmoe / llama.cpp is the median of the rounds' ratios (range).
llama.cpp continues every sequence by the tokens that jmoe chose, so that both route alike. Its time is that
of ``llama_decode`` alone, in a context made for the row; jmoe's includes scheduling and sampling.

Prints a table; ``--json`` keeps all samples. Run it on an otherwise idle machine: llama.cpp's OpenMP threads
wait for one another after every operation, and if another process takes a core the run says nothing about
llama.cpp.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared.pinning import pin
from shared.protocol import (
    JMOE,
    Contender,
    Jmoe,
    Row,
    Run,
    Samples,
    add_options,
    check_options,
    paired_ratio,
    random_rows,
    settings,
    take_turns,
)
from shared.random_checkpoint import checkpoint

LLAMA_CPP = "llama.cpp"
SCRIPTS, PEER = Path(__file__).parent, "vs_llama_cpp.peer"
CHECKED = 8  # prompts whose logits are compared before timing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter with llama_cpp and gguf")
    parser.add_argument(
        "--correlation",
        type=float,
        default=0.99998,
        help="least median correlation of the logits (random weights; trained ones need a lower one)",
    )
    parser.add_argument("--json", type=Path, help="also write settings and all samples here")
    parser.set_defaults(model="configs/model/olmoe-0.9b.toml", context=128, dtype="bfloat16")
    args = parser.parse_args()
    check_options(parser, args)
    return args


class LlamaCpp:
    """A process of ``vs_llama_cpp.peer`` under ``python``, which answers one call at a time."""

    def __init__(self, python: str):
        try:
            self.process = subprocess.Popen(
                [python, "-m", PEER], cwd=SCRIPTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise SystemExit(f"--llama-python {python}: {error.strerror}") from None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.communicate()  # closes its input, which ends it

    def call(self, name: str, **values: Any) -> Any:
        """Returns the answer to a call. An error of the peer ends this program with the error's line."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps({"call": name, **values}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise SystemExit("llama.cpp's process has ended") from None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its process has ended"}
        if "error" in answer:
            hint = " (how to install it: --help)" if "ModuleNotFound" in answer["error"] else ""
            raise SystemExit(f"llama.cpp: {answer['error']}{hint}")
        return answer["result"]

    def contender(self, row: Row, tokens: list[list[int]]) -> Contender:
        """Returns a contender that runs ``row`` and continues its prompts with ``tokens``."""

        def run(prompts: list[list[int]], new: int) -> Run:
            return self.call(row.phase, prompts=prompts, tokens=[t[:new] for t in tokens])

        return run


def check_same_model(
    ours: Jmoe, theirs: LlamaCpp, prompts: list[list[int]], least: float
) -> dict[str, float]:
    """Returns how similar the logits after the prompts are. Ends the program if the models are not the same.

    Rounding may change the choice of an expert, so a minority of the prompts may differ by more.
    """
    import numpy as np

    pairs = [(ours.llm.logits(p)[-1], np.array(theirs.call("logits", prompt=p))) for p in prompts]
    correlation = statistics.median(float(np.corrcoef(a, b)[0, 1]) for a, b in pairs)
    equal = statistics.mean(float(a.argmax() == b.argmax()) for a, b in pairs)
    if not (correlation >= least and equal > 0.5):
        raise SystemExit(
            f"llama.cpp does not compute jmoe's model: median correlation of the logits {correlation:.6f} "
            f"(at least {least}), same likeliest token after {equal:.0%} of the prompts"
        )
    return {"correlation": correlation, "equal_argmax": equal}


def measure(args: argparse.Namespace, directory: Path, theirs: LlamaCpp) -> dict[str, Any]:
    """Returns what the check found, the samples, the equal tokens and the touched experts."""
    import numpy as np

    from jmoe.checkpoint import read_config

    cfg = read_config(directory, args.dtype)
    if cfg.architecture != "OlmoeForCausalLM" or cfg.router.norm_topk_prob:
        raise SystemExit(f"{args.model}: llama.cpp's olmoe is OlmoeForCausalLM with norm_topk_prob false")
    with tempfile.TemporaryDirectory() as temporary:  # llama.cpp keeps the file mapped
        file, sizes = Path(temporary) / "model.gguf", dataclasses.asdict(cfg)
        theirs.call("load", directory=str(directory), file=str(file), sizes=sizes, threads=args.threads)
    ours = Jmoe(directory, args)
    prompts = np.random.default_rng(1).integers(0, cfg.vocab_size, (CHECKED, args.context)).tolist()
    check = check_same_model(ours, theirs, prompts, args.correlation)
    rows = random_rows(args, cfg.vocab_size)
    contenders: dict[str, list[tuple[str, Contender]]] = {}
    for name, row in rows.items():
        run = getattr(ours, row.phase)
        _, tokens = run(row.prompts, row.new)
        contenders[name] = [(JMOE, run), (LLAMA_CPP, theirs.contender(row, tokens))]
    samples, equal = take_turns(rows, contenders, args.rounds)
    for row in rows.values():
        if row.phase == "decode":
            ours.measure_active(row.prompts, row.new)
    found = {"check": check, "tokens_per_second": samples, "equal_tokens": equal}
    return {**found, "active_experts": ours.active}


def table(heading: str, result: dict[str, Any]) -> str:
    """Returns the result in Markdown."""
    samples: Samples = result["tokens_per_second"]
    lines = [
        f"{heading}\n",
        "| tokens/s | jmoe | llama.cpp | jmoe / llama.cpp | tokens that llama.cpp would also choose |",
        "|---|---|---|---|---|",
    ]
    for row, speeds in samples.items():
        ours, theirs = (statistics.median(speeds[name]) for name in (JMOE, LLAMA_CPP))
        ratio, least, most = paired_ratio(speeds[JMOE], speeds[LLAMA_CPP])
        alike = result["equal_tokens"][row][LLAMA_CPP]
        lines.append(
            f"| {row} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} ({least:.2f}..{most:.2f}) | {alike:.0%} |"
        )
    active = ", ".join(f"{count:.1f} at batch {batch}" for batch, count in result["active_experts"].items())
    check = result["check"]
    lines.append(f"\nExperts a layer and decode step: {active}.")
    lines.append(
        f"Logits before timing: median correlation {check['correlation']:.6f}, same likeliest token after "
        f"{check['equal_argmax']:.0%} of {CHECKED} prompts."
    )
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    pin(args.threads)  # the peer inherits it
    with LlamaCpp(args.llama_python) as theirs:
        peer = theirs.call("versions")
        import jax

        jax.config.update("jax_platforms", "cpu")
        with checkpoint(args.model) as directory:
            result = measure(args, directory, theirs)
    versions = {"jax": jax.__version__, **peer}
    model = Path(args.model).name.removesuffix(".toml")
    heading = (
        f"{model}, {args.dtype}, {args.threads} thread(s), {args.rounds} rounds, {args.context} tokens of "
        f"context; llama-cpp-python {peer['llama_cpp_python']}, built with {peer['system_info']}"
    )
    print(table(heading, result))
    if args.json:
        report = {"model": model, "settings": settings(args), "versions": versions, **result}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
