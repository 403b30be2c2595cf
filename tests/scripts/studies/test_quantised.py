"""Tests the study of quantised weights: the checkpoints that it writes, its sums, and its verdicts."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jmoe_kernels.quantised import Quantised, dequantised
from studies.quantised import loading, targets
from studies.quantised.checkpoints import FP8_BLOCKS, INT4_32, INT4_128, W8A8, Stored, write_quantised
from studies.quantised.study import STUDY
from studies.quantised.vllm import FIRST_WORD, write_tokenizer
from support.models import hf_tiny
from tokenizers import Tokenizer

from jmoe.checkpoint.load import load_model
from jmoe.config.model import ModelConfig
from jmoe.config.reading import read_toml
from jmoe.mesh import make_mesh

LAST_STEP = (
    2.0**-5
)  # relative to a number, half the distance of two numbers of E4M3 at most, and its rounding


def errors(stored: Stored, folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the numbers of each expert's matrix as written and as the engine reads them."""
    config = hf_tiny.hf_config(hidden_size=256, head_dim=64, moe_intermediate_size=64)
    plain, directory = folder / "plain", folder / "stored"
    tensors = hf_tiny.write_checkpoint(plain, config)
    hf_tiny.write_tokenizer(plain)
    directory.mkdir()
    write_quantised(plain, directory, stored)
    assert (directory / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()
    model = load_model(directory, make_mesh(devices=jax.devices()[:1]), dtype="float32")
    found = []
    for i, layer in enumerate(model.layers):
        experts: Any = layer.moe and layer.moe.experts
        for name, weight, index in (
            ("gate", experts.gate_up_E2FD, (slice(None), 0)),
            ("up", experts.gate_up_E2FD, (slice(None), 1)),
            ("down", experts.down_EDF, ()),
        ):
            value = weight.get_value()
            assert isinstance(value, Quantised), name
            ours = np.asarray(dequantised(value))[index]
            names = [f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight" for e in range(len(ours))]
            found += [(tensors[n].astype(np.float32), one) for n, one in zip(names, ours, strict=True)]
    return found


@pytest.mark.parametrize(
    ("stored", "steps", "group"),
    [(W8A8, 127, None), (INT4_32, 7, 32), (INT4_128, 7, 128)],
    ids=["int8 a row", "int4 in 32", "int4 in 128"],
)
def test_written_integers_are_read_as_the_nearest_ones(stored: Stored, steps: int, group: int, tmp_path):
    for plain, read in errors(stored, tmp_path):
        size = min(group or plain.shape[1], plain.shape[1])
        groups = plain.reshape(len(plain), -1, size)
        step = np.repeat(np.abs(groups).max(axis=-1), size, axis=1) / steps
        bound = step * (0.5 + steps * 2.0**-8)  # the scale is rounded to bfloat16
        assert (np.abs(plain - read) <= bound + 1e-12).all()
        assert np.abs(plain - read).max() > 0


def test_written_blocks_of_fp8_are_read_as_the_nearest_numbers(tmp_path):
    for plain, read in errors(FP8_BLOCKS, tmp_path):
        least = np.abs(plain).max() / 448 * 2.0**-9  # of the numbers near zero
        assert (np.abs(plain - read) <= np.abs(plain) * 2 * LAST_STEP + least).all()
        assert np.abs(plain - read).max() > 0


def test_a_word_is_a_token_and_every_token_has_a_text(tmp_path):
    write_tokenizer(tmp_path, 1000)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1000
    assert tokenizer.encode("w0 w743 w17").ids == [FIRST_WORD, FIRST_WORD + 743, FIRST_WORD + 17]
    assert all(tokenizer.decode([i]) for i in range(1000))


@pytest.mark.parametrize(
    ("name", "experts", "attention"), [("gpt-oss-20b", "e2m1", None), ("Qwen3-30B-A3B-FP8", "e4m3", "e4m3")]
)
def test_a_published_configuration_quantises_what_it_says(name: str, experts: str, attention: str | None):
    model = loading.MODELS[name]
    cfg = ModelConfig.from_dict(read_toml(loading.shape_path(model.shape)))
    found = loading.published_codings(cfg, model.quantization)
    codes = {path.rpartition(".")[2]: coding.code for path, coding in found.items()}
    assert codes["gate_up_E2FD"] == codes["down_EDF"] == experts
    assert {code for leaf, code in codes.items() if "proj" in leaf} == ({attention} - {None})
    assert "lm_head" not in codes and "embed" not in codes


HEAD = {"date": "d", "processor": "P", "cores": 2, "versions": {"jmoe": "1"}}


def spoken(**speeds: float) -> dict:
    names = {"bf16": "jmoe", "int8": "jmoe int8", "a8": "jmoe int8 A8", "q8": "llama.cpp q8_0"}
    return {names[key]: [speed, speed] for key, speed in speeds.items()}


def speed_part() -> dict:
    rows = {
        "decode 1": spoken(bf16=100, int8=140, a8=120, q8=100),
        "prefill 512": spoken(bf16=100, int8=100, a8=150, q8=70),
    }
    settings = {"rounds": 2, "context": 16, "new": 32}
    check = {name: {"correlation": 0.5, "equal_argmax": 1.0} for name in list(rows["decode 1"])[1:]}
    found = {"model": "m", "settings": settings, "check": check, "file_bytes": {"llama.cpp q8_0": 10**9}}
    return {"command": "c", "threads": {"2": HEAD | found | {"tokens_per_second": rows}}}


def test_the_page_compares_every_form_with_its_target():
    page = STUDY.document({"speed": speed_part()})
    assert "jmoe int8 / llama.cpp q8_0 | at least 1.3 | 1.40 (1.40..1.40) | met" in page
    assert "jmoe int8 A8 / llama.cpp q8_0 | at least 1.3 | 1.20 (1.20..1.20) | missed" in page
    assert "jmoe int8 A8 / jmoe bfloat16 | at least 1.4 | 1.50 (1.50..1.50) | met" in page
    assert "jmoe int8 A8 / llama.cpp's best | at least 2 | 2.14 (2.14..2.14) | met" in page
    assert "jmoe int8 / jmoe bfloat16 | at least 1 | 1.00 (1.00..1.00) | met" in page
    assert "| jmoe int8 | 140.0 (1.40) | 100.0 (1.00) | 0.50000 |" in page
    assert "llama.cpp q8_0 1000 MB" in page and "q4_0 |" not in page


def test_the_page_compares_servers_kernels_text_and_start():
    def side(speed: float, first: float) -> dict:
        times = {"output_throughput": speed, "median_ttft_ms": first, "median_tpot_ms": 1.0}
        return {key: [value] * 2 for key, value in times.items()}

    row = {"jmoe": side(30.0, 10.0), "vllm": side(20.0, 14.0)}
    settings = {"rounds": 2, "output_len": 32}
    served = HEAD | {"model": "m", "settings": settings, "rows": {"8": row}}
    forms = {"int8": served | {"prefill": {"input_len": 512, **row}}}
    kernel = {"form": "MXFP4", "activations": "int8", "weights_per_s": [6e9], "bytes_per_s": [3.2e9]}
    streaming = HEAD | {"model": "m", "isa": "i", "forms": [kernel | {"bandwidth": 4e9}]}
    losses = {"nll": 1.0, "error_percent": 0.01}
    texts = {
        "bfloat16": losses | {"made": "", "change_percent": 0.0},
        "int8": losses | {"made": "x", "change_percent": 0.2},
        "KV int8": losses | {"made": "x", "change_percent": 0.04},
    }
    quality = HEAD | {"command": "c", "model": "m", "windows": 2, "length": 4, "domains": 1, "forms": texts}
    times = {"bfloat16": [2.0, 2.0], "int8": [2.8, 2.8], "int4": [3.2, 3.2]}
    start = HEAD | {"command": "c", "model": "m", "checkpoint_bytes": 10**9, "threads": 2, "rounds": 2}
    page = STUDY.document({
        "vllm": {"command": "c", "forms": forms},
        "streaming": {"command": "c", "threads": {"1": streaming}},
        "quality": quality,
        "start": start | {"seconds": times},
    })  # fmt: skip
    assert "int8, 8 at a time, output tokens/s: jmoe / vLLM | at least 1.5 | 1.50 (1.50..1.50) | met" in page
    assert "vLLM / jmoe | at least 1.5 | 1.40 (1.40..1.40) | missed" in page
    assert "1 thread(s), MXFP4, A8: share of read bandwidth | at least 90% | 80% | missed" in page
    assert "int8: perplexity | at most +0.1 % | +0.200 ± 0.010 % | missed" in page
    assert "KV int8: perplexity | at most +0.05 % | +0.040 ± 0.010 % | met" in page
    assert "start, int8 / bfloat16 | at most 1.5 | 1.40 (1.40..1.40) | met" in page
    assert "start, int4 / bfloat16 | at most 1.5 | 1.60 (1.60..1.60) | missed" in page
    assert "llama.cpp's" not in page and page.count("Not measured yet") == 2


def test_without_figures_the_page_has_no_verdict():
    page = STUDY.document({})
    assert "met |" not in page and "missed" not in page and targets.targets({"speed": None}) in page


def test_the_page_counts_bytes_beside_bfloat16():
    sizes = {"m": {"bfloat16": [4 * 10**9, 2 * 10**9], "published": [10**9, 10**9]}}
    page = STUDY.document({"loading": {"command": "c", "ranks": [1, 2], "bytes": sizes}})
    assert "| m | published | 1.00 (0.25) | 1.00 (0.50) |" in page
