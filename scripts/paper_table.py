"""Runs one paper's table anew: each of its settings on ``jmoe serve``, its tasks through lm_eval.

    python scripts/paper_table.py binning --model DIR             # the table of configs/eval/binning.toml
    python scripts/paper_table.py binning --model tiny --tasks parity_choices --limit 8 --num-prompts 16

A table (configs/eval/NAME.toml) names the flags of ``jmoe serve``, those of ``jmoe bench serve``, the tasks
with their numbers of examples, the ``--moe-config`` of every setting, and commands of ``jmoe`` to run before.
For each setting one server runs: the load first, then the tasks. Prints a Markdown table: figures of the
load, what lossy techniques did to the assignments, a column a task; ``--json`` keeps everything. Needs
lm-eval[api].
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from shared.results import table
from shared.server_process import free_port, serving

ROOT = Path(__file__).parent.parent
JMOE = [sys.executable, "-m", "jmoe.cli"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", help="binning, capacity, shuffle, offload, or a TOML file")
    parser.add_argument("--model", required=True, help="tiny, or a directory")
    parser.add_argument("--model-dir", type=Path, help="with its tokenizer, for the harness; --model's")
    parser.add_argument("--data", default="", help="text for the commands that a table runs before")
    parser.add_argument("--devices", default="8", help="that a table with several devices runs on")
    parser.add_argument("--tasks", nargs="*", help="instead of the table's; configs/eval has some")
    parser.add_argument("--settings", nargs="+", help="of the table's, by name; all")
    parser.add_argument("--limit", type=int, help="documents of a task at most")
    parser.add_argument("--num-prompts", type=int, help="requests of the load, instead of the table's")
    parser.add_argument(
        "--harness", default=sys.executable, help="a Python that has lm_eval, if not this one"
    )
    parser.add_argument("--serve-options", default=[], nargs=argparse.REMAINDER, help="last: for jmoe serve")
    parser.add_argument("--json", type=Path, help="also write everything measured here")
    return parser.parse_args()


def filled(value: Any, names: dict[str, str]) -> Any:
    """Returns ``value`` after {model}, {data}, {devices} and {work} in its strings are replaced."""
    if isinstance(value, dict):
        return {key: filled(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, names) for item in value]
    if isinstance(value, str):
        for name, known in names.items():
            value = value.replace(f"{{{name}}}", known)
    return value


def run(words: list[str], **environment: str) -> str:
    """Returns the command's standard output. If it fails, raises SystemExit with the end of its errors."""
    done = subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:6])} ... failed: {' '.join(done.stderr.split())[-500:]}")
    return done.stdout


def evaluate(url: str, args: argparse.Namespace, directory: Path, tasks: dict[str, int]) -> dict[str, float]:
    """Returns the first metric of each task."""
    model = f"model={args.model},base_url={url}/v1/completions,tokenizer={directory},num_concurrent=16"
    scores = {}
    for task, shots in tasks.items():
        with tempfile.TemporaryDirectory() as folder:
            words = [args.harness, "-m", "lm_eval", "run", "--model", "local-completions"]
            words += [
                "--model_args",
                f"{model},tokenizer_backend=huggingface,max_length={context(directory)}",
            ]
            words += ["--tasks", task, "--num_fewshot", str(shots), "--include_path", "configs/eval"]
            words += ["--output_path", folder, "--batch_size", "1"]
            words += ["--limit", str(args.limit)] if args.limit else []
            words += ["--confirm_run_unsafe_code"] if task.startswith(("humaneval", "mbpp")) else []
            run(words, HF_ALLOW_CODE_EVAL="1")
            [path] = Path(folder).rglob("results_*.json")
            results = json.loads(path.read_text())["results"][task]
        scores[task] = next(v for k, v in results.items() if "," in k and isinstance(v, float))
    return scores


def context(directory: Path) -> int:
    return json.loads((directory / "config.json").read_text())["max_position_embeddings"]


def main() -> None:
    args = arguments()
    path = Path(args.table) if args.table.endswith(".toml") else ROOT / f"configs/eval/{args.table}.toml"
    directory = args.model_dir or (ROOT / "jmoe/assets/tiny" if args.model == "tiny" else Path(args.model))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        names = {"model": args.model, "data": args.data, "devices": args.devices, "work": work}
        paper = filled(tomllib.loads(path.read_text(encoding="utf-8")), names)
        tasks = paper["tasks"] if args.tasks is None else dict.fromkeys(args.tasks, 0)
        settings = {k: v for k, v in paper["settings"].items() if args.settings is None or k in args.settings}
        if unknown := set(args.settings or ()) - set(settings):
            raise SystemExit(f"{path.name} has no setting {min(unknown)!r}")
        for words in paper.get("prepare", []):
            run([*JMOE, *words])
        for name, moe in settings.items():
            port = free_port()
            words = [*JMOE, "serve", args.model, "--port", str(port), *paper["serve"], *args.serve_options]
            words += ["--moe-config", json.dumps(moe)] if moe else []
            with serving(words, port, Path(work) / "server.log", model=args.model, extra={}) as server:
                load = [*JMOE, "bench", "serve", "--base-url", server.url, *paper["bench"], "--json"]
                load += ["--num-prompts", str(args.num_prompts)] if args.num_prompts else []
                rows[name] = {"load": json.loads(run(load)), "moe": moe}
                rows[name]["scores"] = evaluate(server.url, args, directory.resolve(), tasks)
            print(f"{name}: done", file=sys.stderr, flush=True)
    print(shown(rows, list(tasks)))
    if args.json:
        args.json.write_text(
            json.dumps({"table": path.stem, "model": args.model, "rows": rows}, indent=1) + "\n"
        )


def shown(rows: dict[str, Any], tasks: list[str]) -> str:
    head = ["setting", "output tokens/s", "TPOT p50, ms", "TTFT p99, ms", "remapped", "dropped", *tasks]
    lines = []
    for name, row in rows.items():
        load = row["load"]
        moe = load["moe"] or {"remapped_share": 0.0, "dropped_share": 0.0}
        speed = (f"{load[k]:.2f}" for k in ("output_throughput", "median_tpot_ms", "p99_ttft_ms"))
        shares = (f"{moe[k]:.1%}" for k in ("remapped_share", "dropped_share"))
        lines.append([name, *speed, *shares, *(f"{row['scores'][task]:.3f}" for task in tasks)])
    return table(head, lines)


if __name__ == "__main__":
    main()
