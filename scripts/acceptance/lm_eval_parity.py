"""Compares a server's log-likelihoods with transformers': lm-evaluation-harness sends both the same.

    jmoe serve tiny --dtype float32 --port 8000 &
    python scripts/acceptance/lm_eval_parity.py --base-url http://127.0.0.1:8000 --model tiny \\
        --model-dir MODEL_DIR

Every log-likelihood of the tasks in configs/eval (multiple choice, whole documents) through the harness'
``local-completions`` must be within ``--tolerance``, absolute or relative, of the one that its ``hf`` backend
computes with transformers in float32, and every greedy answer the same text. It prints one line. The exit
code is 0 if all agree, 1 if not. It needs lm-eval[api], torch and transformers.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TASKS = ("parity_choices", "parity_text", "parity_sums")
Samples = dict[tuple[str, int], list[Any]]  # (task, document) -> the answers to its requests


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", required=True, help="of the server, which runs in float32")
    parser.add_argument("--model", required=True, help="its name there")
    parser.add_argument("--model-dir", required=True, help="Hugging Face directory of the same checkpoint")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--max-length", type=int, default=1024, help="context of both, in tokens")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--json", type=Path, help="also write the worst differences here")
    return parser.parse_args()


def harness(model: str, model_args: str, key: str) -> Samples:
    """Runs the tasks; raises SystemExit with the end of the harness' own words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", model_args]
        words += ["--tasks", ",".join(TASKS), "--include_path", str(ROOT / "configs/eval")]
        words += ["--output_path", folder, "--log_samples", "--batch_size", "1", "--device", "cpu"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder, "OPENAI_API_KEY": key}
        ran = subprocess.run(words, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"lm_eval --model {model} failed: {' '.join(ran.stderr.split())[-500:]}")
        return read_samples(Path(folder))


def read_samples(folder: Path) -> Samples:
    found: Samples = {}
    for task in TASKS:
        for path in folder.rglob(f"samples_{task}_*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                sample = json.loads(line)
                found[task, sample["doc_id"]] = sample["resps"]
    return found


def leaves(answers: Any) -> list[Any]:
    """Returns numbers, truth values and texts of nested lists; some versions write numbers as text."""
    if isinstance(answers, list):
        return [leaf for part in answers for leaf in leaves(part)]
    try:
        return [float(answers)] if not isinstance(answers, bool) else [answers]
    except ValueError:
        return [answers]


def difference(ours: float, theirs: float) -> float:
    """Returns the smaller of the absolute and the relative difference; infinite if a number is not finite."""
    apart = abs(ours - theirs)
    return min(apart, apart / max(abs(theirs), 1e-30)) if math.isfinite(apart) else math.inf


def compare(ours: Samples, theirs: Samples) -> dict[str, Any]:
    """Returns the report of a comparison.

    numbers: number of compared numbers.
    worst: largest difference.
    where: task, document and numbers of the largest difference.
    texts: number of compared texts and greedy flags.
    unequal: texts and flags that differ.
    """
    if not theirs or set(ours) != set(theirs):
        raise SystemExit(
            f"the harness answered {len(ours)} documents here and {len(theirs)} with transformers"
        )
    report: dict[str, Any] = {"numbers": 0, "worst": 0.0, "where": None, "texts": 0, "unequal": []}
    for key in sorted(theirs):
        for mine, reference in zip(leaves(ours[key]), leaves(theirs[key]), strict=True):
            if isinstance(mine, float) and isinstance(reference, float):
                report["numbers"] += 1
                if (apart := difference(mine, reference)) > report["worst"]:
                    report["worst"], report["where"] = apart, [*key, mine, reference]
            else:
                report["texts"] += 1
                if mine != reference:
                    report["unequal"].append([*key, mine, reference])
    return report


def for_generate(directory: Path, folder: str) -> Path:
    """Returns a folder with the checkpoint's files except generation_config.json: the harness cannot run a
    checkpoint with stop strings, and completions use only those of the request."""
    for path in directory.iterdir():
        if path.name != "generation_config.json":
            (Path(folder) / path.name).symlink_to(path)
    return Path(folder)


def main() -> int:
    args = arguments()
    directory = Path(args.model_dir).resolve()
    if not (directory / "config.json").is_file():
        raise SystemExit(f"{directory} is no Hugging Face directory: it has no config.json")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = for_generate(directory, folder)
        # the harness cuts long documents two tokens shorter for a server, which generates one
        theirs = harness("hf", f"pretrained={checkpoint},dtype=float32,max_length={args.max_length - 2}", "")
    url = args.base_url.rstrip("/").removesuffix("/v1") + "/v1/completions"
    api = f"model={args.model},base_url={url},tokenizer={directory},tokenizer_backend=huggingface"
    more = f"max_length={args.max_length},num_concurrent=4"
    ours = harness("local-completions", f"{api},{more}", args.api_key)
    report = compare(ours, theirs)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    agree = report["worst"] <= args.tolerance and not report["unequal"]
    print(
        f"{'equal' if agree else 'NOT equal'}: {report['numbers']} log-likelihoods, worst difference "
        f"{report['worst']:.1e} (limit {args.tolerance:g}); {report['texts']} answers, "
        f"{len(report['unequal'])} unequal"
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
