"""Compiles the engine's whole prefill and decode steps for TPU slices, without a TPU: do they fit?

    python scripts/tpu_aot_check.py
    python scripts/tpu_aot_check.py --model configs/model/mixtral-8x7b.toml --slice v5e:4x4 --mesh 1x8x2

A row says, for one chip: bytes of weights and KV pages, of temporaries and of the program, and their share of
its memory; bytes of experts that stay in its host's; the collectives of one step by kind, with the bytes that
leave the chip if each takes a ring; and how long the compiler took. The exit status is 1 where a step does
not fit or does not compile. Needs libtpu (``jmoe[tpu]``). Nothing here has run on a TPU, so nothing here is a
time of a step.
"""

import argparse
import json
import os
import re
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path

from shared import tpu_compiler

ROOT = Path(__file__).parents[1]
MEMORY = {"v5e": 16e9, "v6e": 32e9, "v5p": 95e9}  # bytes of a chip, by its data sheet
# the model, the slice, the mesh (data x expert x tensor), sequences and prompt tokens per token rank
CASES = (
    ("mixtral-8x7b", "v5e:4x4", "1x8x2", 8, 512),
    ("mixtral-8x7b", "v6e:2x4", "1x8x1", 16, 512),
    ("mixtral-8x7b", "v6e:4x4", "1x8x2", 16, 512),  # configs/deploy/tpu-jobset.yaml
    ("deepseek-v2-lite", "v5e:2x4", "1x8x1", 8, 512),
    ("gpt-oss-20b", "v5e:2x4", "1x8x1", 8, 512),
    ("qwen3-30b-a3b", "v5e:2x4", "1x8x1", 8, 512),
    ("qwen3-30b-a3b", "v6e:2x4", "1x8x1", 32, 512),
    ("qwen3-235b-a22b", "v5e:8x8", "1x16x4", 8, 128),
    ("qwen3-235b-a22b", "v6e:4x8", "1x16x2", 8, 512),
    ("qwen3-235b-a22b", "v5e:16x16", "2x32x4", 16, 256),
    ("qwen3-235b-a22b", "v6e:16x16", "2x64x2", 16, 128),
)
CONTEXT, PAGE = 4096, 32  # tokens a sequence may have, tokens of a page
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
BITS = {"pred": 8, "bf16": 16}
COLUMNS = (
    "model",
    "slice",
    "mesh",
    "step",
    "resident_gb",
    "temporary_gb",
    "code_gb",
    "of_memory",
    "host_gb",
    "collectives",
)
COLUMNS += ("sent_mb", "compile_s", "verdict")


@dataclass(frozen=True)
class Case:
    """One step to compile.

    model: file of the model's sizes.
    slice: slice of chips.
    mesh: numbers of chips, data x expert x tensor.
    sequences: number of sequences of a token rank.
    tokens: number of tokens of a token rank; 1 is decode.
    layers: number of layers, None for all.
    transport: transport of the experts' rows.
    attention: form of attention.
    moe: MoE configuration as text.
    """

    model: Path
    slice: str
    mesh: tuple[int, int, int]
    sequences: int
    tokens: int
    layers: int | None
    transport: str
    attention: str
    moe: str


def shape_bytes(text: str) -> list[int]:
    """Returns the bytes of every array shape in a piece of HLO."""
    found = []
    for kind, dims in re.findall(r"\b(pred|bf16|[suf]\d+)(?:e\w+)?\[([\d,]*)\]", text):
        bits = BITS.get(kind) or int(kind[1:])
        found.append(prod(map(int, filter(None, dims.split(",")))) * bits // 8)
    return found


def group_size(line: str, devices: int) -> int:
    """Returns the number of devices that take part in a collective."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if compact := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(compact[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        # This is an axis or a part of one: 'axis_0':(2)4 is the 4 after the first 2.
        return prod(
            int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        )
    return devices


def collectives(hlo: str, devices: int) -> dict[str, tuple[int, int]]:
    """Returns by kind (the number of collectives, the bytes that a chip sends if each goes around a ring).

    Bodies of loops count once, and all branches of conditions count; sampling has some branches of a few
    bytes. What a ragged all-to-all sends depends on the routing. It counts as the smaller of its two buffers,
    the rows that a chip sends on average.
    """
    opened = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(([^)]*)\)")
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    computation, seen = "", set()
    for line in hlo.splitlines():
        if line[:1] in ("%", "E"):
            computation = line
        if (match := opened.search(line)) is None:
            continue
        result, kind, started, operands = match.groups()
        # A collective that runs during other work is in each of the fusions that run at the same time.
        if chain := re.search(r'channel_id=(\d+),.*chain_id="(\d+)"', line):
            if (kind, *chain.groups()) in seen:
                continue
            seen.add((kind, *chain.groups()))
        n, sizes = group_size(line, devices), shape_bytes(result)
        # The start of an all-reduce has its result's shape; other starts have (operand, result, ...).
        whole = max(sizes, default=0) if started and kind != "all-reduce" else sum(sizes)
        if kind == "reduce-scatter":
            whole *= n
        elif kind == "all-reduce" and computation.startswith("%all-reduce-scatter"):
            kind = "reduce-scatter"  # the compiler's form of a fused one
        elif kind == "ragged-all-to-all":
            operand = re.search(rf"{re.escape(operands.split(', ')[0])} = (\S+)", hlo)
            whole = min([whole, *shape_bytes(operand[1] if operand else "")])
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
        found[kind][0] += 1
        found[kind][1] += round(whole * share)
    return {kind: (count, sent) for kind, (count, sent) in sorted(found.items())}


def schedule(hlo: str) -> dict[str, list[str]]:
    """Returns each computation's copies from host memory and its kernels, in the order in which they run.

    Only computations with such copies are in it. A copied slice has a "start" and a "done" with the number
    that pairs them; a kernel has its name.
    """
    found: dict[str, list[str]] = {}
    computation, starts = "", {}
    for line in hlo.splitlines():
        if line[:1] in ("%", "E"):
            computation, starts = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%"), {}
        if (named := re.match(r"\s+(?:ROOT )?%(\S+) = ", line)) is None:
            continue
        events = found.setdefault("entry" if computation.startswith("main") else computation, [])
        if " dynamic-slice-start(" in line and "S(5)" in line:  # the memory space of the host
            starts[named[1]] = len(starts)
            events.append(f"start {starts[named[1]]}")
        elif done := re.search(r" dynamic-slice-done\(%([^)\s]+)\)", line):
            events += [f"done {starts[done[1]]}"] if done[1] in starts else []
        elif 'custom_call_target="tpu_custom_call"' in line:
            events.append(re.sub(r"[.\d]+$", "", named[1]))
    return {name: events for name, events in found.items() if any(e.startswith("start") for e in events)}


def named(case: Case) -> dict:
    """Returns the columns that say which case it is."""
    step = f"decode {case.sequences}" if case.tokens == 1 else f"prefill {case.tokens}"
    return {
        "model": case.model.stem, "slice": case.slice, "mesh": "x".join(map(str, case.mesh)),
        "step": f"{step} a rank", "transport": case.transport,
    }  # fmt: skip


def check(case: Case) -> dict:
    """Returns the row of one case. Raises what the compiler raises."""
    import jax  # after main() has set the environment that libtpu reads
    from jax.experimental import topologies
    from jmoe_kernels.backends import TPU

    from jmoe.config.model import ModelConfig
    from jmoe.config.moe import MoEConfig
    from jmoe.engine.deployment.lowering import lower_step
    from jmoe.engine.step.inputs import Sizes
    from jmoe.mesh import make_mesh

    cfg = ModelConfig.from_dict(tomllib.loads(case.model.read_text()))
    cfg = cfg.first(case.layers or cfg.num_hidden_layers)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.slice).devices
    mesh = make_mesh(*case.mesh, devices=devices)
    table = CONTEXT // PAGE
    slots = case.sequences if case.tokens == 1 else 1
    prefill = min(TPU.num_row_tokens, case.tokens), case.tokens
    sizes = Sizes((case.sequences,), prefill, PAGE, max(1, case.sequences) * table, table)
    start = time.perf_counter()
    moe = replace(MoEConfig.from_text(case.moe), transport=case.transport, attention=case.attention)  # pyright: ignore[reportArgumentType]
    compiled = lower_step(cfg, moe, mesh, sizes, sequences=slots, tokens=case.tokens).compile()
    seconds = time.perf_counter() - start
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None  # this compiler reports both
    resident, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    code = memory.generated_code_size_in_bytes  # the code is in the same memory
    of_memory = (resident + temporary + code) / MEMORY[case.slice.split(":")[0]]
    kinds = collectives(hlo, mesh.size)
    return named(case) | {
        "layers": cfg.num_hidden_layers, "jax": jax.__version__, "libtpu": version("libtpu"),
        "resident_gb": round(resident / 1e9, 2), "temporary_gb": round(temporary / 1e9, 2),
        "code_gb": round(code / 1e9, 2), "of_memory": round(of_memory, 2),
        "collectives": ", ".join(f"{count} {kind}" for kind, (count, _) in kinds.items()) or "none",
        "sent_mb": round(sum(sent for _, sent in kinds.values()) / 1e6, 2),
        "host_gb": round(memory.host_argument_size_in_bytes / 1e9, 2),
        "bytes": {
            "host": memory.host_argument_size_in_bytes, "resident": resident, "temporary": temporary,
        },
        "host_copies": schedule(hlo), "by_kind": kinds, "compile_s": round(seconds, 1),
        "verdict": "fits" if of_memory <= 1 else "DOES NOT FIT",
    }  # fmt: skip


def cases(args: argparse.Namespace) -> Iterator[Case]:
    shapes = [(args.model, args.slice, args.mesh, args.sequences, args.tokens)] if args.model else CASES
    for model, where, mesh, sequences, tokens in shapes:
        path = model if isinstance(model, Path) else ROOT / f"configs/model/{model}.toml"
        a, b, c = map(int, mesh.split("x"))
        for step in {"both": (1, tokens), "decode": (1,), "prefill": (tokens,)}[args.step]:
            how = args.layers, args.transport, args.attention, args.moe_config
            yield Case(path, where, (a, b, c), sequences, step, *how)


def main() -> int:
    """Parses the arguments, sets libtpu's environment and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="a configs/model file (default: all cases of the table)")
    parser.add_argument("--slice", default="v6e:2x4", help="with --model (default: %(default)s)")
    parser.add_argument("--mesh", default="1x8x1", help="data x expert x tensor (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=16, help="a token rank (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of a prefill run (default: %(default)s)")
    parser.add_argument("--step", choices=("both", "decode", "prefill"), default="both")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--transport", default="replicated", help="(default: %(default)s)")
    parser.add_argument("--attention", default="dp", help="dp or tp (default: %(default)s)")
    parser.add_argument(
        "--moe-config", default="{}", help="techniques as for jmoe serve; a placement is not read"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if (reason := tpu_compiler.why_not()) is not None:
        raise SystemExit(reason)
    failed = False
    if not args.json:
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(tpu_compiler.environment(Path(scratch)))
        del os.environ["LIBTPU_INIT_ARGS"]  # no dumps
        for case in cases(args):
            try:
                row = check(case)
            except Exception as error:
                row = named(case) | {"verdict": f"ERROR {' '.join(str(error)[:300].split())}"}
            failed |= row["verdict"] != "fits"
            line = "| " + " | ".join(str(row.get(column, "")) for column in COLUMNS) + " |"
            print(json.dumps(row, default=str) if args.json else line, flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
