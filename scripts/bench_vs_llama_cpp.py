"""Compares jmoe's speed with llama.cpp's on an OLMoE model: same CPU, weights, prompts and tokens.

    python3 -m venv PEER
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \\
      PEER/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf==0.19.0
    python scripts/bench_vs_llama_cpp.py --llama-python PEER/bin/python --threads 2 --json OUT

Built from source, llama.cpp uses all that this CPU has; the table names the instructions it was built with.
Its weights are the same ones in its own file format, bfloat16 except norms and router (float32), read as it
reads them by default, with its default settings (flash attention as it chooses, a float16 cache).

``--quantizations`` and ``--activations`` add jmoe's quantised forms beside bfloat16, ``--types`` names
llama.cpp's, which it makes from its bfloat16 file itself; ``--types`` without a name leaves it out.

Before anything is timed, every form's logits after several prompts are compared with those of jmoe in
bfloat16; if they differ by more than the form's rounding does (``vs_llama_cpp.forms``), the script reports it
and ends.

Rows: prefill of a long prompt, and decoding at several batch sizes, as ``bench_vs_transformers.py`` has them
(``shared.protocol``): all engines on the same cores, llama.cpp in a process for each form, run strictly in
turn in opposite order every other round, and a ratio is the median of the rounds' ratios (range). llama.cpp
continues every sequence by the tokens that jmoe chose in bfloat16, so that both route alike. Its time is that
of ``llama_decode`` alone, in a context made for the row; jmoe's includes scheduling and sampling.

Prints a table; ``--json`` keeps all samples. Run it on an otherwise idle machine: llama.cpp's OpenMP threads
wait for one another after every operation, and if another process takes a core the run says nothing about
llama.cpp.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shared.pinning import pin
from shared.protocol import (
    JMOE,
    Contender,
    Jmoe,
    Samples,
    add_options,
    check_options,
    paired_ratio,
    random_rows,
    settings,
    take_turns,
)
from shared.random_checkpoint import checkpoint
from vs_llama_cpp.client import LlamaCpp
from vs_llama_cpp.forms import ACTIVATIONS, CORRELATIONS, FILE_TYPES, LLAMA_CPP, forms

CHECKED = 8  # prompts whose logits are compared before timing
Peers = dict[str, LlamaCpp]  # by the type of the file


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    add = parser.add_argument
    add("--llama-python", default=sys.executable, help="interpreter with llama_cpp and gguf")
    add("--types", nargs="*", choices=FILE_TYPES, default=["bf16"], help="of llama.cpp's files")
    add("--quantizations", nargs="*", choices=CORRELATIONS, default=[], help="of jmoe, beside bfloat16")
    add("--activations", nargs="+", choices=ACTIVATIONS, default=["auto"], help="of each quantization")
    add(
        "--correlation",
        type=float,
        help="least median correlation of all logits (random weights have limits; trained ones need lower)",
    )
    add("--json", type=Path, help="also write settings and all samples here")
    parser.set_defaults(model="configs/model/olmoe-0.9b.toml", context=128, dtype="bfloat16")
    args = parser.parse_args()
    check_options(parser, args)
    return args


def load_peers(args: argparse.Namespace, directory: Path, sizes: dict[str, Any], peers: Peers) -> dict:
    """Makes llama.cpp's files and loads each in its process; returns their bytes by type."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:  # llama.cpp keeps the files mapped
        plain = Path(temporary) / "bf16.gguf"
        for name, peer in peers.items():
            if not plain.exists():
                peer.call("write", directory=str(directory), file=str(plain), sizes=sizes)
            file, number = plain, FILE_TYPES[name].number
            if number is not None:
                file = Path(temporary) / f"{name}.gguf"
                where = {"source": str(plain), "file": str(file)}
                peer.call("quantize", **where, number=number, threads=args.threads)
            peer.call("load", file=str(file), threads=args.threads)
            found[f"{LLAMA_CPP} {name}"] = file.stat().st_size
    return found


def engines(args: argparse.Namespace, directory: Path, cfg: Any) -> dict[str, Jmoe]:
    """Returns an engine of each of jmoe's forms, by name, with room for the rows and no more."""
    from jmoe.engine.deployment.sizes import PAGE_SIZE
    from jmoe.mesh import make_mesh, split_attention
    from jmoe.nn.kinds import page_bytes

    longest = max(args.prompt + 1, args.context + args.new)
    in_batch = max(args.batches, default=1) * -(-(args.context + args.new) // PAGE_SIZE)
    pages = max(-(-longest // PAGE_SIZE), in_batch)
    room = pages * page_bytes(cfg, split_attention(make_mesh(), "dp"), PAGE_SIZE)
    return {
        form.name: Jmoe(directory, args, kv_memory=room, **form.options)
        for form in forms(args.quantizations, args.activations)
    }


def compare_logits(
    args: argparse.Namespace, ours: dict[str, Jmoe], peers: Peers, vocab: int
) -> dict[str, dict[str, float]]:
    """Returns how similar each form's logits are to those of jmoe in bfloat16.

    Ends the program if a form does not compute the model. Rounding may change the choice of an expert, so a
    minority of the prompts may differ by more.
    """
    import numpy as np

    prompts = np.random.default_rng(1).integers(0, vocab, (CHECKED, args.context)).tolist()
    wanted = [ours[JMOE].llm.logits(prompt)[-1] for prompt in prompts]
    least = {form.name: form.correlation for form in forms(args.quantizations, args.activations)}
    found = {name: [ours[name].llm.logits(p)[-1] for p in prompts] for name in ours if name != JMOE}
    for name, peer in peers.items():
        found[f"{LLAMA_CPP} {name}"] = [np.array(peer.call("logits", prompt=p)) for p in prompts]
        least[f"{LLAMA_CPP} {name}"] = FILE_TYPES[name].correlation
    return {
        name: similarity(name, wanted, logits, least[name] if args.correlation is None else args.correlation)
        for name, logits in found.items()
    }


def similarity(name: str, wanted: list[Any], logits: list[Any], least: float) -> dict[str, float]:
    """Returns the median correlation and the share of equal likeliest tokens; checks the correlation."""
    import numpy as np

    pairs = list(zip(wanted, logits, strict=True))
    correlation = statistics.median(float(np.corrcoef(a, b)[0, 1]) for a, b in pairs)
    equal = statistics.mean(float(a.argmax() == b.argmax()) for a, b in pairs)
    if not correlation >= least:
        raise SystemExit(
            f"{name} does not compute jmoe's model: median correlation of the logits {correlation:.6f} "
            f"(at least {least}), same likeliest token after {equal:.0%} of the prompts"
        )
    return {"correlation": correlation, "equal_argmax": equal}


def measure(args: argparse.Namespace, directory: Path, peers: Peers) -> dict[str, Any]:
    """Returns what the check found, the samples, the equal tokens and the touched experts."""
    from jmoe.checkpoint import read_config

    cfg = read_config(directory, args.dtype)
    if cfg.architecture != "OlmoeForCausalLM" or cfg.router.norm_topk_prob:
        raise SystemExit(f"{args.model}: llama.cpp's olmoe is OlmoeForCausalLM with norm_topk_prob false")
    sizes = load_peers(args, directory, dataclasses.asdict(cfg), peers)
    ours = engines(args, directory, cfg)
    check = compare_logits(args, ours, peers, cfg.vocab_size)
    rows = random_rows(args, cfg.vocab_size)
    contenders: dict[str, list[tuple[str, Contender]]] = {}
    for name, row in rows.items():
        _, tokens = getattr(ours[JMOE], row.phase)(row.prompts, row.new)
        contenders[name] = [(form, getattr(engine, row.phase)) for form, engine in ours.items()]
        contenders[name] += [(f"{LLAMA_CPP} {kind}", peers[kind].contender(row, tokens)) for kind in peers]
    samples, equal = take_turns(rows, contenders, args.rounds)
    for row in rows.values():
        if row.phase == "decode":
            ours[JMOE].measure_active(row.prompts, row.new)
    return {
        "check": check, "file_bytes": sizes, "tokens_per_second": samples, "equal_tokens": equal,
        "active_experts": ours[JMOE].active,
    }  # fmt: skip


def table(heading: str, result: dict[str, Any]) -> str:
    """Returns the result in Markdown: a line for each row and each contender other than jmoe in bfloat16."""
    samples: Samples = result["tokens_per_second"]
    lines = [
        f"{heading}\n",
        "| tokens/s | contender | jmoe | contender | jmoe / contender | tokens that it would also choose |",
        "|---|---|---|---|---|---|",
    ]
    for row, speeds in samples.items():
        for name in list(speeds)[1:]:
            ours, theirs = (statistics.median(speeds[each]) for each in (JMOE, name))
            ratio, least, most = paired_ratio(speeds[JMOE], speeds[name])
            alike = result["equal_tokens"][row][name]
            lines.append(
                f"| {row} | {name} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} ({least:.2f}..{most:.2f}) "
                f"| {alike:.0%} |"
            )
    active = ", ".join(f"{count:.1f} at batch {batch}" for batch, count in result["active_experts"].items())
    lines.append(f"\nExperts a layer and decode step: {active}.")
    for name, check in result["check"].items():
        lines.append(
            f"Logits before timing, {name}: median correlation {check['correlation']:.6f}, same likeliest "
            f"token after {check['equal_argmax']:.0%} of {CHECKED} prompts."
        )
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    pin(args.threads)  # the peers inherit it
    with ExitStack() as stack:
        peers = {name: stack.enter_context(LlamaCpp(args.llama_python)) for name in args.types}
        versions = next(iter(peers.values())).call("versions") if peers else {}
        import jax

        jax.config.update("jax_platforms", "cpu")
        with checkpoint(args.model) as directory:
            result = measure(args, directory, peers)
    model = Path(args.model).name.removesuffix(".toml")
    heading = (
        f"{model}, {args.dtype}, {args.threads} thread(s), {args.rounds} rounds, {args.context} tokens of "
        "context"
    )
    if versions:
        heading += f"; llama-cpp-python {versions['llama_cpp_python']}, built with {versions['system_info']}"
    print(table(heading, result))
    if args.json:
        versions = {"jax": jax.__version__, **versions}
        report = {"model": model, "settings": settings(args), "versions": versions, **result}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
