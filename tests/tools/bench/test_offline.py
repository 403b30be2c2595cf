"""Tests ``jmoe bench throughput``, ``latency`` and ``moe-layer`` on a tiny checkpoint: counts, refusals."""

import json

import pytest
from support.models.hf_tiny import hf_config, write_checkpoint

from jmoe.cli.main import main

SMALL = ("--max-model-len", "32", "--max-num-batched-tokens", "8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    changes = {"vocab_size": 64, "max_position_embeddings": 32, "num_local_experts": 4, "eos_token_id": None}
    write_checkpoint(directory, hf_config(**changes))
    return str(directory)


def run(capsys, *argv) -> tuple[int, str, str]:
    try:
        code = main(["bench", *map(str, argv)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_throughput_counts_what_it_generated(capsys, model, tmp_path):
    trace = tmp_path / "t.jsonl"
    rows = [{"timestamp": 0, "input_length": 5, "output_length": 3}] * 3
    rows += [{"timestamp": 9, "input_length": 60, "output_length": 4}]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("--max-num-seqs", 2, "--trace", trace, "--num-iters", 2)
    code, out, err = run(capsys, "throughput", model, *SMALL, *args, "--json")
    report = json.loads(out)
    assert code == 0, err
    assert (report["requests"], report["input_tokens"], report["output_tokens"]) == (4, 15 + 28, 13)
    assert report["clipped"] == {
        "input": 0, "output": 0, "context": 1, "input_tokens": 32, "output_tokens": 0,
    }  # fmt: skip
    assert len(report["rounds"]) == 2
    assert report["output_tokens_per_second"] == pytest.approx(13 / report["elapsed_time"])


def test_latency_of_a_batch(capsys, model):
    args = ("--batch-size", 2, "--input-len", 4, "--output-len", 5, "--num-iters", 3)
    code, out, err = run(capsys, "latency", model, *SMALL, *args, "--json")
    report = json.loads(out)
    assert code == 0, err
    assert (report["batch_size"], report["input_len"], report["output_len"]) == (2, 4, 5)
    assert 0 < report["prefill_median_ms"] < report["latency_median_ms"] <= report["latency_p99_ms"]
    assert 0 < report["per_token_median_ms"] <= report["per_token_p99_ms"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("latency", "--input-len", 40, *SMALL), "it holds --input-len 1 --output-len 31"),
        (("latency", "--num-iters", 0), "num-iters must be at least 1"),
        (("throughput", "--num-prompts", 0), "must be at least 1"),
        (("throughput", "--trace", "/nowhere.jsonl"), "cannot read /nowhere.jsonl"),
        (("moe-layer", "--active", 9), "lie between 2"),
        (("moe-layer", "--batch-sizes", 0), "must be at least 1"),
        (("moe-layer", "--dtype", "int8"), "invalid choice"),
    ],
)
def test_what_cannot_be_measured_is_one_line(capsys, model, args, said):
    code, out, err = run(capsys, args[0], model, *args[1:])
    assert code == 2 and out == "" and said in err and len(err.splitlines()) == 1


def test_a_layer_by_tokens_and_active_experts(capsys, model):
    args = ("--batch-sizes", 1, 16, "--active", 2, "--layers", 2, "--num-iters", 2, "--json")
    code, out, err = run(capsys, "moe-layer", model, *args)
    report = json.loads(out)
    assert code == 0, err
    assert [(row["tokens"], row["active_experts"]) for row in report["rows"]] == [(1, 2), (16, 4), (16, 2)]
    assert report["kernel"] in ("cpu", "xla", "pallas_gpu", "pallas_tpu") and report["why"]
    for row in report["rows"]:
        read = row["active_experts"] * report["expert_bytes"]
        assert row["gb_per_s"] == pytest.approx(read / row["ms"] / 1e6)
