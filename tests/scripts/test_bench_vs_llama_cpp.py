"""Tests that ``bench_vs_llama_cpp.py`` gives llama.cpp the checkpoint's numbers under GGUF's names."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from shared.random_checkpoint import FAMILIES, hf_config, write_random
from support.documented_commands import SIZES
from vs_llama_cpp.olmoe_gguf import open_tensors, write_olmoe_gguf

from jmoe import LLM
from jmoe.checkpoint import read_config
from jmoe.config.model import ModelConfig
from jmoe.config.reading import read_toml
from jmoe.models import model_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs/model").glob("*.toml"))
WITH_RANDOM = [path for path in CONFIGS if ModelConfig.from_dict(read_toml(path)).architecture in FAMILIES]


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    (folder / "sizes.toml").write_text(SIZES)
    write_random(folder / "sizes.toml", folder / "model")
    return folder / "model"


@pytest.mark.parametrize("path", WITH_RANDOM, ids=lambda path: path.stem)
def test_the_config_of_a_random_checkpoint_is_read_as_what_it_was_made_from(path):
    cfg = ModelConfig.from_dict(read_toml(path))
    assert model_config(hf_config(cfg)) == cfg


@pytest.mark.parity
@pytest.mark.parametrize("path", WITH_RANDOM, ids=lambda path: path.stem)
def test_transformers_reads_it_too(path, tmp_path):
    from transformers import AutoConfig

    written = hf_config(ModelConfig.from_dict(read_toml(path)))
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == written["num_hidden_layers"]


@pytest.mark.parity
def test_transformers_computes_a_random_checkpoint_alike(random_checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = np.random.default_rng(0).integers(0, 512, 20).tolist()
    model = AutoModelForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    with LLM(random_checkpoint, dtype="float32", warm_up=False) as llm:
        np.testing.assert_allclose(llm.logits(tokens), theirs, atol=1e-4)


def test_the_gguf_file_has_the_checkpoints_numbers(random_checkpoint, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    cfg = read_config(random_checkpoint)
    write_olmoe_gguf(random_checkpoint, tmp_path / "model.gguf", dataclasses.asdict(cfg))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    ours, theirs = open_tensors(random_checkpoint), {t.name: t for t in reader.tensors}
    assert reader.fields["olmoe.rope.freq_base"].contents() == cfg.rope.rope_theta
    assert reader.fields["olmoe.expert_used_count"].contents() == cfg.num_experts_per_tok
    embedding = theirs["token_embd.weight"].data.reshape(-1).view(np.uint16)
    np.testing.assert_array_equal(embedding, ours["model.embed_tokens.weight"].reshape(-1))
    experts = theirs["blk.1.ffn_up_exps.weight"].data.reshape(cfg.num_experts, -1).view(np.uint16)
    for e in range(cfg.num_experts):
        name = f"model.layers.1.mlp.experts.{e}.up_proj.weight"
        np.testing.assert_array_equal(experts[e], ours[name].reshape(-1))
    gate = theirs["blk.0.ffn_gate_inp.weight"].data.reshape(-1)
    want = (ours["model.layers.0.mlp.gate.weight"].reshape(-1).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(gate, want)
