"""Measures the part vllm: jmoe's server and vLLM's on one checkpoint, in bfloat16 and as W8A8.

The figures are those of the serving study's part vllm on a random model. It has a tokenizer of as many words
as the model has tokens, and prompts are random words, so that they route as random tokens do. W8A8 is the
same model in compressed-tensors' form, whose activations are int8 in both servers.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from shared.random_checkpoint import checkpoint
from shared.results import smallest
from studies.quantised.checkpoints import W8A8, write_quantised
from studies.quantised.commands import run

from jmoe.checkpoint import read_config

SMALLEST = {"batches": [1], "rounds": 1, "prompt": 8, "context": 4, "new": 2}
OPTIONS = {"bfloat16": "", "int8": "--activation-dtype int8"}  # of jmoe serve
NUM_WORDS = 20_000  # of the text that prompts are cut from
FIRST_WORD = 256  # the first token that is not a byte


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """Returns the part of the results by form, or None if vLLM is not installed."""
    args, found = smallest(args, SMALLEST), {}
    with checkpoint(str(args.sizes)) as plain, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        count = read_config(plain).vocab_size
        write_text(folder / "words.txt", count)
        for form in args.served:
            directory = folder / form
            directory.mkdir()
            if form == "int8":
                write_quantised(plain, directory, W8A8)
            else:
                for path in plain.iterdir():
                    (directory / path.name).symlink_to(path.resolve())
            write_tokenizer(directory, count)
            figures = compare(args, directory, folder / "words.txt", OPTIONS[form])
            if figures is None:
                return None
            del figures["command"]  # it names the temporary checkpoint
            found[form] = figures | {"model": args.sizes.stem}
    return {"forms": found}


def compare(
    args: argparse.Namespace, directory: Path, text: Path, jmoe_options: str
) -> dict[str, Any] | None:
    """Returns the figures of both servers, or None if vLLM is not installed."""
    with tempfile.TemporaryDirectory() as out:
        words = ["serving", "--parts", "vllm", "--out", out, "--threads", args.threads, "--model", directory]
        words += ["--dtype", "bfloat16", "--rounds", args.rounds, "--concurrency", *args.batches]
        words += ["--input-len", args.context, "--output-len", args.new, "--prefill-len", args.prompt]
        words += ["--prompt-text", text, "--peer-command", args.vllm_command]
        if jmoe_options:
            words += [f"--jmoe-options={jmoe_options}"]
        run("study.py", *words)
        file = Path(out) / "serving.json"
        return json.loads(file.read_text(encoding="utf-8"))["vllm"] if file.exists() else None


def write_text(path: Path, count: int) -> None:
    """Writes random words of the tokenizer."""
    ids = np.random.default_rng(0).integers(0, count - FIRST_WORD, NUM_WORDS)
    path.write_text(" ".join(f"w{i}" for i in ids), encoding="utf-8")


def write_tokenizer(directory: Path, count: int) -> None:
    """Writes a tokenizer of ``count`` tokens: the bytes, and words "w0", "w1" and so on between spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(bytes_)}
    vocabulary |= {f"w{i}": FIRST_WORD + i for i in range(count - FIRST_WORD)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    split = pre_tokenizers.Split(" ", "removed")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
