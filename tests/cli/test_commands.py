"""Tests the command line end to end on a tiny checkpoint: outputs, JSON, one-line refusals, exit codes."""

import json
import os
import socket
import subprocess
import sys

import pytest
from support.command_line import run
from support.models.hf_tiny import hf_config, write_checkpoint, write_tokenizer

from jmoe.cli.flags import read_serve_config, size
from jmoe.tools.data import bounded, read_documents, round_robin, windows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Returns a model of 4 experts, top 2, with 64 tokens of context and one token a byte."""
    directory = tmp_path_factory.mktemp("model")
    changes = {"vocab_size": 256, "max_position_embeddings": 64, "num_local_experts": 4, "eos_token_id": None}
    write_checkpoint(directory, hf_config(**changes))
    write_tokenizer(directory)
    return str(directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.txt"
    path.write_text("the first document\nof two lines\n<|endoftext|>\nthe second one\n", encoding="utf-8")
    return str(path)


def test_generate_prints_the_completion_only(capsys, model):
    args = ("generate", model, "--prompt", "hello", "--max-tokens", "5", "--temperature", "0")
    code, out, err = run(capsys, *args)
    assert code == 0 and err == ""
    code, report, _ = run(capsys, *args, "--json")
    [output] = json.loads(report)["outputs"]
    assert code == 0 and out == output["text"] + "\n"
    assert len(output["token_ids"]) == 5 and output["finish_reason"] == "length"


def test_the_default_length_ends_with_the_context(capsys, model):
    args = ("generate", model, "--prompt", "p" * 60, "--temperature", "0", "--json")
    code, report, _ = run(capsys, *args)
    [output] = json.loads(report)["outputs"]
    assert code == 0 and len(output["token_ids"]) == 4 and output["finish_reason"] == "length"
    code, out, err = run(capsys, *args, "--max-tokens", "5")
    assert code == 2 and out == "" and "maximum context length is 64 tokens" in err
    assert "requested 65 tokens (60 in the prompt, 5 to generate)" in err
    code, _, err = run(capsys, *args[:2], "--prompt", "p" * 64)
    assert code == 2 and "maximum context length is 64 tokens" in err


def test_generate_reads_a_file_and_standard_input(capsys, model, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n\nthree\n")
    flags = ("--max-tokens", "2", "--temperature", "0", "--json")
    _, report, _ = run(capsys, "generate", model, "--prompts-file", str(path), *flags)
    outputs = json.loads(report)["outputs"]
    assert len(outputs) == 3
    read, write = os.pipe()
    os.write(write, b"two")
    os.close(write)
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))
    _, report, _ = run(capsys, "generate", model, *flags)
    assert json.loads(report)["outputs"][0]["token_ids"] == outputs[1]["token_ids"]


def test_eval_modes_agree_and_report_the_experts(capsys, model, text):
    reports = {}
    for mode in ("prefill", "decode"):
        code, out, _ = run(
            capsys,
            "eval",
            model,
            "--data",
            text,
            "--mode",
            mode,
            "--batch-size",
            "2",
            "--max-model-len",
            "9",
            "--json",
        )
        assert code == 0 and out.count("\n") == 1
        reports[mode] = json.loads(out)
    one, two = reports["prefill"], reports["decode"]
    assert one["tokens"] == two["tokens"]
    assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-3)
    for report in (one, two):
        moe = report["moe"]
        # every token of a window runs through k experts, except (in decode) the last, which predicts nothing
        assert moe["assignments"] == sum(layer["assignments"] for layer in moe["per_layer"])
        assert 1 <= moe["active_experts"] <= 4 and moe["active_experts"] == moe["active_experts_baseline"]
        assert moe["dropped"] == moe["rerouted"] == moe["remapped"] == 0


def test_eval_max_tokens_bounds_the_scored_tokens(capsys, model, text):
    for mode in ("prefill", "decode"):
        _, out, _ = run(capsys, "eval", model, "--data", text, "--mode", mode, "--max-tokens", "7", "--json")
        assert json.loads(out)["tokens"] == 7


def test_doctor_and_convert(capsys, model, tmp_path):
    code, out, _ = run(capsys, "doctor", model, "--json")
    report = json.loads(out)
    assert code == 0 and report["model"]["experts"] == 4 and all(c["why"] for c in report["choices"])
    assert run(capsys, "doctor", model)[0] == 0
    out_dir = str(tmp_path / "converted")
    assert run(capsys, "convert", model, out_dir)[0] == 0
    args = ("--prompt", "hello", "--max-tokens", "4", "--temperature", "0", "--json")
    texts = [
        json.loads(run(capsys, "generate", m, *args)[1])["outputs"][0]["token_ids"] for m in (model, out_dir)
    ]
    assert texts[0] == texts[1]


def test_doctor_tells_where_offloaded_experts_lie(capsys, model):
    """The doctor reports where offloaded experts are: here two layers of 4 experts of 3 x 16 x 32 numbers."""
    assert json.loads(run(capsys, "doctor", model, "--json")[1])["offload"] is None
    moe = '{"offload": {"slots_per_layer": 3, "prefetch_per_layer": 4, "eviction": "lru"}}'
    args = ("doctor", model, "--dtype", "float32", "--moe-config", moe)
    report = json.loads(run(capsys, *args, "--json")[1])["offload"]
    one = 3 * 16 * 32 * 4
    assert report.pop("why")
    assert report == {
        "expert_bytes": one, "host_bytes": 2 * 4 * one, "slots": 6, "slots_per_layer": 3.0,
        "pool_bytes": 6 * one, "aside_bytes": 5 * one, "predictor": "next_gate", "warm": False,
        "eviction": "lru", "executor": "graph", "copies_beside": False,
    }  # fmt: skip
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert "offload: 0.0 MiB of experts in host memory, 0.006 MiB each; on the device 6 slots (3.0 a" in out
    assert "offload predictor: next_gate, cold; eviction lru\n" in out
    assert "offload executor: graph (one compiled step" in out
    for refused, message in (
        ('{"offload": {"memory": 1}}', "the minimum is memory 30720"),
        ('{"offload": {"memory": "1MB", "store": "absent.npz"}}', "absent.npz"),
    ):
        code, _, err = run(capsys, *args[:-1], refused)
        assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "./no/such", "--prompt", "x"], "'no/such' is not a directory"),
        (["generate", "MODEL", "--prompt", "x", "--max-tokens", "-1"], "max_tokens must be at least 0"),
        (["generate", "MODEL", "--prompt", "x", "--temperature", "9"], "temperature must be between 0 and 2"),
        (["generate", "MODEL", "--prompt", "a " * 200], "maximum context length is 64 tokens"),
        (["generate", "MODEL", "--prompt", "x", "--max-model-len", "999"], "between 1 and the model's 64"),
        (["generate", "MODEL", "--prompt", "x", "--expert-parallel-size", "3"], "does not divide experts 4"),
        (
            ["generate", "MODEL", "--prompt", "x", "--moe-config", '{"transprt": 1}'],
            "nearest known key: 'transport'",
        ),
        (["generate", "MODEL", "--prompt", "x", "--moe-config", "{"], "not valid JSON"),
        (["generate", "MODEL", "--prompt", "x", "--moe-config", "absent.toml"], "cannot read absent.toml"),
        (["generate", "MODEL", "--prompts-file", "absent"], "No such file"),
        (["generate", "--bogus"], "unrecognized arguments: --bogus"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["eval", "MODEL", "--data", "absent.txt"], "no such data file: absent.txt"),
        (["eval", "MODEL", "--data", "TEXT", "--batch-size", "0"], "batch-size must be at least 1"),
        (["eval", "MODEL", "--data", "TEXT", "--kv-memory", "1KiB"], "holds no page"),
        (["eval", "MODEL", "--data", "TEXT", "--kv-memory", "lots"], "is not a size such as 2GiB"),
        (["serve", "MODEL", "--config", "absent.toml"], "cannot read absent.toml"),
        (["convert", "no/such/dir", "out"], "'no/such/dir' is not a directory"),
        (["generate", "MODEL", "--prompt", "x", "--revision", "main"], "revision is for a model of the Hub"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, model, text, argv, message):
    argv = [{"MODEL": model, "TEXT": text}.get(a, a) for a in argv]
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert message in err and "Traceback" not in err


def test_port_in_use_and_unknown_config_key(capsys, model, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = run(capsys, "serve", model, "--port", port)
    assert code == 2 and f"port {port} on 127.0.0.1 is in use" in err
    path = tmp_path / "serve.toml"
    path.write_text("prot = 8000\n")
    code, _, err = run(capsys, "serve", model, "--config", str(path))
    assert code == 2 and "unknown key 'prot'; nearest known key: 'port'" in err


def test_the_example_configuration_is_read():
    from pathlib import Path

    values = read_serve_config(Path(__file__).parents[2] / "configs/serve/cpu.toml")
    assert values["kv_memory"] == 256 * 2**20 and values["moe_config"] == {"transport": "replicated"}


@pytest.mark.parametrize(("text", "want"), [("2GiB", 2**31), ("512MiB", 2**29), ("1.5KB", 1500), ("77", 77)])
def test_sizes(text, want):
    assert size(text) == want


def test_help_and_refusals_do_not_import_jax():
    code = "import sys; from jmoe.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" + (
        "assert not {'jax', 'numpy', 'orbax', 'starlette', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_generate_imports_neither_server_nor_orbax(model):
    code = (
        "import sys; from jmoe.cli.main import main\n"
        f"main(['generate', {model!r}, '--prompt', 'x', '--max-tokens', '1', '--max-model-len', '32'])\n"
        "heavy = {'orbax', 'starlette', 'uvicorn', 'torch', 'transformers', 'prometheus_client', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# ---- data ------------------------------------------------------------------------------------------


def test_documents_windows_and_bounds(tmp_path):
    import gzip
    import lzma

    text = "a\nb\n<|endoftext|>\nc <|endoftext|> d\n<|endoftext|>\n\n<|endoftext|>\n"
    (tmp_path / "x.txt").write_text(text)
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "x.txt.xz").write_bytes(lzma.compress(text.encode()))
    for name in ("x.txt", "x.txt.gz", "x.txt.xz"):
        assert list(read_documents(tmp_path / name)) == ["a\nb", "c <|endoftext|> d"]
    (tmp_path / "x.jsonl").write_text('{"text": "t"}\n\n{"prompt": "p", "text": "no"}\n')
    assert list(read_documents(tmp_path / "x.jsonl")) == ["t", "p"]
    assert list(round_robin([["a", "b", "c"], ["d"]])) == ["a", "d", "b", "c"]
    cut = list(windows([[1, 2, 3, 4, 5], [6], [7, 8]], 2))
    assert cut == [[1, 2], [3, 4], [7, 8]], "a window of one token has nothing to score"
    assert list(bounded([[1, 2, 3], [4, 5, 6]], 3)) == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "data files are .txt"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.txt.xz", b"not xz", "cannot read"),
        ("a.txt.gz", b"not gz", "cannot read"),
        ("a.jsonl", b"{", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"other": 1}', "line 1 is not a JSON object with 'prompt' or 'text'"),
        ("a.jsonl", b'{"text": 1}', "must be a string"),
    ],
)
def test_damaged_data_names_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / name))
