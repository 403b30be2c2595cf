"""Tests other people's checkpoints whose tensors and ``config.json`` disagree, or whose config is silent."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.models import hf_tiny

from jmoe.checkpoint import convert, load_model, read_config, save_hf
from jmoe.checkpoint.hf.reader import HFCheckpoint
from jmoe.checkpoint.identity import model_identity
from jmoe.checkpoint.params import dotted
from jmoe.config.moe import MoEConfig
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.deployment.sizes import context_length
from jmoe.mesh import make_mesh
from jmoe.models.decoder import Decoder
from jmoe.moe.routing import router_logits
from jmoe.placement.placement import Placement
from jmoe.tools.doctor import doctor

GOLDEN = Path(__file__).parent.parent / "golden"
BFLOAT16 = ml_dtypes.bfloat16
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# a number that float32 holds, and bfloat16 and float16 do not
FINE = np.float32(1 + 2**-13)


def load(directory: Path, **settings) -> Decoder:
    return load_model(directory, make_mesh(devices=jax.devices()[:1]), **settings)


def values(model: Decoder) -> dict[str, np.ndarray]:
    found = {dotted(k): np.asarray(p.get_value()) for k, p in nnx.to_flat_state(nnx.state(model))}
    return {k: v.view(BFLOAT16) if v.dtype == np.uint16 else v for k, v in found.items()}


def assert_same(one: Decoder, other: Decoder) -> None:
    a, b = values(one), values(other)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def size(model: Decoder) -> int:
    return sum(v.nbytes for v in values(model).values())


# ---- embedding and head ----------------------------------------------------------------------------


def tied(directory: Path, dtype: str = "float32", **tensors: np.ndarray | None) -> dict[str, np.ndarray]:
    """Writes a checkpoint whose config says tied. ``tensors`` are added, or left out if they are None."""
    config = hf_tiny.hf_config(dtype=dtype, tie_word_embeddings=True)
    all_tensors = {n: t for n, t in (hf_tiny.random_tensors(config) | tensors).items() if t is not None}
    return hf_tiny.write_checkpoint(directory, config, tensors=all_tensors)


def test_a_head_that_is_not_the_embedding_is_read(tmp_path: Path, caplog):
    head = np.random.default_rng(1).standard_normal((96, 32)).astype(np.float32)
    tied(tmp_path / "hf", **{HEAD: head})
    model = load(tmp_path / "hf")
    assert f"{HEAD!r} is another matrix" in caplog.text
    np.testing.assert_array_equal(model.lm_head[...], head)
    assert not model.cfg.tie_word_embeddings

    convert(tmp_path / "hf", tmp_path / "out")
    again = load(tmp_path / "out")
    assert_same(again, model)
    assert model_identity(again) == model_identity(model)
    for form in ("hf", "out"):
        report = doctor(str(tmp_path / form), EngineSettings())
        assert report["model"]["weight_bytes"] == size(model), "as it will be loaded"


def test_one_number_makes_another_head_and_none_a_copy(tmp_path: Path):
    embed = tied(tmp_path / "copy", **{HEAD: None})[EMBED]
    for name, change in (("copy", 0.0), ("last", 1.0)):
        head = embed.copy()
        head[-1, -1] += np.float32(change)
        tied(tmp_path / name, **{HEAD: head})
        assert hasattr(load(tmp_path / name), "lm_head") == bool(change), name


def test_a_head_is_compared_in_the_dtype_that_it_is_computed_in(tmp_path: Path):
    """A head that equals the embedding only after rounding to the model's bfloat16 is tied only there."""
    ones = np.ones((96, 32), np.float32)
    tied(tmp_path, "bfloat16", **{EMBED: ones.astype(BFLOAT16), HEAD: ones * FINE})
    assert not hasattr(load(tmp_path), "lm_head")
    assert hasattr(load(tmp_path, dtype="float32"), "lm_head")


def test_a_tied_matrix_may_be_stored_as_the_head(tmp_path: Path):
    tensors = tied(tmp_path / "usual")
    tied(tmp_path / "head", **{EMBED: None, HEAD: tensors[EMBED]})
    assert_same(load(tmp_path / "head"), load(tmp_path / "usual"))
    config = json.loads((tmp_path / "head" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{EMBED}' of Qwen3MoeForCausalLM is missing"):
        load(tmp_path / "head")


@pytest.mark.parity
def test_transformers_reads_the_same_head(tmp_path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jmoe import LLM

    head = 0.2 * np.random.default_rng(1).standard_normal((96, 32)).astype(np.float32)
    for name, tensors in (("own", {HEAD: head}), ("as head", {EMBED: None, HEAD: head})):
        tied(tmp_path / name, **tensors)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen3_moe"}))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        with torch.no_grad():
            want = theirs.eval()(torch.arange(5, 25)[None]).logits[0].numpy()
        with LLM(tmp_path / name, max_num_seqs=1, warm_up=False) as llm:
            np.testing.assert_allclose(llm.logits(range(5, 25)), want, atol=1e-4)


# ---- dtypes ----------------------------------------------------------------------------------------


def silent(directory: Path, dtypes: dict[str, str], **fields) -> Path:
    """Writes a checkpoint without a dtype in its config. ``dtypes`` has each tensor's by its ending."""
    config = hf_tiny.hf_config(**fields)
    tensors = hf_tiny.random_tensors(config)
    for name, tensor in tensors.items():
        kind = next((d for ending, d in dtypes.items() if name.endswith(ending)), dtypes[""])
        tensors[name] = tensor.astype(hf_tiny.DTYPES[kind])
    del config["dtype"]
    hf_tiny.write_checkpoint(directory, config, tensors=tensors)
    return directory


@pytest.mark.parametrize(
    ("dtypes", "right"),
    [
        ({"": "bfloat16"}, "bfloat16"),
        ({"": "float32"}, "float32"),
        ({"": "float16"}, "float32"),
        # the first tensors of a file, or the most frequent ones, are not most of the weights
        ({"norm.weight": "float32", ".gate.weight": "float32", "": "bfloat16"}, "bfloat16"),
        ({"norm.weight": "bfloat16", "": "float32"}, "float32"),
    ],
)
def test_a_config_without_dtype_has_that_of_its_tensors(tmp_path: Path, dtypes, right: str):
    silent(tmp_path, dtypes)
    assert read_config(tmp_path).dtype == load(tmp_path).cfg.dtype == right
    assert read_config(tmp_path, "bfloat16").dtype == "bfloat16"


def test_quantised_tensors_have_no_say_in_the_dtype(tmp_path: Path):
    """Quantised tensors do not decide the dtype.

    The published gpt-oss is mostly U8, the rest is BF16, and its config has no dtype.
    """
    save_file(
        {"model.layers.0.mlp.experts.down_proj_blocks": np.zeros((4, 64, 16), np.uint8),
         EMBED: np.zeros((8, 4), BFLOAT16)},
        tmp_path / "model.safetensors",
    )  # fmt: skip
    config = json.loads((GOLDEN / "gpt_oss" / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).dtype == "bfloat16"


def test_the_text_models_dtype_is_that_of_a_config_that_nests_it(tmp_path: Path):
    config = json.loads((GOLDEN / "llama4" / "config.json").read_text())
    text = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype", "architectures")}
    for stated, right in (("bfloat16", "bfloat16"), ("float16", "float32")):
        nested = {
            "architectures": ["Llama4ForConditionalGeneration"],
            "text_config": text | {"dtype": stated},
        }
        (tmp_path / "config.json").write_text(json.dumps(nested))
        assert read_config(tmp_path).dtype == right


def in_float32(directory: Path, source: Path, endings: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Writes ``source`` in bfloat16, but tensors with these endings get numbers that only float32 holds."""
    shutil.copytree(source, directory)
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    tensors = {
        name: tensor.astype(np.float32) * FINE if name.endswith(endings) else tensor.astype(BFLOAT16)
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors")
    return tensors


KEPT = {  # for each family, endings of the tensors that are stored in float32, and their places
    "deepseek_v3": {".gate.weight": "moe.router.gate_ED",
                    "e_score_correction_bias": "moe.router.correction_E",
                    "kv_a_layernorm.weight": "attention.kv_norm"},
    "gpt_oss": {"router.weight": "moe.router.gate_ED", "router.bias": "moe.router.bias_E",
                "self_attn.sinks": "attention.sinks_H", "q_proj.bias": "attention.q_bias"},
    "qwen2_moe": {".gate.weight": "moe.router.gate_ED", "shared_expert_gate.weight": "shared.share_1D",
                  "input_layernorm.weight": "input_norm.scale_D"},
    "phimoe": {".gate.weight": "moe.router.gate_ED", "input_layernorm.bias": "input_norm.bias_D"},
}  # fmt: skip


@pytest.mark.parametrize("family", KEPT)
def test_routers_and_vectors_stored_in_float32_stay_so(tmp_path: Path, family: str):
    tensors = in_float32(tmp_path / "hf", GOLDEN / family, tuple(KEPT[family]))
    model = load(tmp_path / "hf")
    assert model.cfg.dtype == "bfloat16"
    last = model.cfg.num_hidden_layers - 1
    found = values(model)
    for ending, path in KEPT[family].items():
        name = next(n for n in tensors if n.endswith(ending) and f".layers.{last}." in n)
        assert found[f"layers.{last}.{path}"].dtype == np.float32, path
        np.testing.assert_array_equal(found[f"layers.{last}.{path}"], tensors[name])
    assert found["embed"].dtype == found[f"layers.{last}.moe.experts.down_EDF"].dtype == BFLOAT16

    convert(tmp_path / "hf", tmp_path / "out")
    assert_same(load(tmp_path / "out"), model)
    for form in ("hf", "out"):
        report = doctor(str(tmp_path / form), EngineSettings())
        assert report["model"]["weight_bytes"] == size(model)
        asked = values(load(tmp_path / form, dtype="bfloat16"))
        assert asked[f"layers.{last}.moe.router.gate_ED"].dtype == BFLOAT16, "the user's word is the last"


def test_a_float32_router_is_the_same_everywhere(tmp_path: Path):
    """A float32 router is the same on a mesh, under a placement, with offloaded experts and after a save."""
    tensors = in_float32(tmp_path / "hf", GOLDEN / "qwen3_moe", (".gate.weight", "norm.weight"))
    convert(tmp_path / "hf", tmp_path / "out")
    plain = load(tmp_path / "hf")
    experts, layers = plain.cfg.num_experts, len(plain.cfg.moe_layers)
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
    placement = Placement(rows, 1, model_identity(plain))
    offload = MoEConfig.from_dict({"offload": {"slots_per_layer": 2}})
    for form in ("hf", "out"):
        gate = tensors["model.layers.1.mlp.gate.weight"]
        mesh = make_mesh(expert=2, devices=jax.devices()[:2])
        for model, want in (
            (load_model(tmp_path / form, mesh), gate),
            (load(tmp_path / form, moe=offload), gate),
            (load(tmp_path / form, placement=placement), gate[rows[1]]),
        ):
            got = np.asarray(model.layers[1].moe.router.gate_ED[...])
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, want)
    save_hf(plain, json.loads((tmp_path / "hf" / "config.json").read_text()), tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), plain)
    with HFCheckpoint(tmp_path / "saved") as saved:
        assert saved.tensors["model.layers.1.mlp.gate.weight"].dtype == "F32"
        assert saved.tensors[EMBED].dtype == "BF16"


def test_a_float32_router_chooses_as_it_was_stored(tmp_path: Path):
    """A float32 router tells two experts apart that are equal in bfloat16, where the lower id would win."""
    tensors = in_float32(tmp_path / "hf", GOLDEN / "qwen3_moe", (".gate.weight",))
    gate = tensors["model.layers.1.mlp.gate.weight"]
    gate[0] = gate[0].astype(BFLOAT16).astype(np.float32)
    gate[1] = gate[0] * FINE
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    layer = load(tmp_path / "hf").layers[1].moe
    x = np.sign(gate[:1]).astype(np.float32)
    logits = np.asarray(router_logits(x, layer.router.weights, layer.kernels.dense))
    assert logits[0, 1] > logits[0, 0]
    np.testing.assert_allclose(logits, x @ gate.T, rtol=1e-5)


# ---- contexts, names, layers -----------------------------------------------------------------------

SMALL = hf_tiny.hf_config(max_position_embeddings=40960)
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("rope", "longest", "original"),
    [
        (YARN | {"original_max_position_embeddings": 32768}, 131072, 32768),  # this is in Qwen3's card
        (YARN, 163840, 40960),
        (YARN | {"factor": 1.0}, 40960, 40960),
        # max_position_embeddings already has the factor, as in DeepSeek and gpt-oss
        (YARN | {"factor": 10.0, "original_max_position_embeddings": 4096}, 40960, 4096),
        (YARN | {"factor": 2.0, "original_max_position_embeddings": 4096}, 40960, 4096),
        ({"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e6}, 40960, 40960),
        ({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, 40960, None),
    ],
)
def test_yarn_makes_contexts_longer(tmp_path: Path, rope: dict, longest: int, original: int | None):
    for spelling in ("rope_parameters", "rope_scaling"):
        config = {k: v for k, v in SMALL.items() if k != "rope_parameters"}
        (tmp_path / "config.json").write_text(json.dumps(config | {spelling: rope, "rope_theta": 1e6}))
        cfg = read_config(tmp_path)
        assert cfg.rope.original_max_position_embeddings == original
        assert context_length(cfg, None) == context_length(cfg, longest) == longest
        with pytest.raises(ValueError, match=f"between 1 and the model's {longest}, got {longest + 1}"):
            context_length(cfg, longest + 1)


@pytest.mark.parametrize("factor", [1e30, 1e9])
def test_a_context_beyond_all_positions_is_refused(tmp_path: Path, factor: float):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"rope_parameters": YARN | {"factor": factor}}))
    with pytest.raises(ValueError, match=r"config.json: a context of \d+ tokens exceeds 2147483647"):
        read_config(tmp_path)


def test_phi_is_known_by_the_name_that_its_makers_gave_it(tmp_path: Path):
    shutil.copytree(GOLDEN / "phimoe", tmp_path / "phi")
    config = json.loads((GOLDEN / "phimoe" / "config.json").read_text())
    (tmp_path / "phi" / "config.json").write_text(
        json.dumps(config | {"architectures": ["PhiMoEForCausalLM"]})
    )
    assert_same(load(tmp_path / "phi"), load(GOLDEN / "phimoe"))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_only_a_layer_that_predicts_further_tokens_is_left_out(tmp_path: Path, family: str):
    tensors = load_file(GOLDEN / family / "model.safetensors")
    config = json.loads((GOLDEN / family / "config.json").read_text())
    last, count = config["num_hidden_layers"] - 1, config["num_hidden_layers"]
    layer = {n.replace(f".{last}.", f".{count}.", 1): t for n, t in tensors.items() if f"layers.{last}." in n}
    predicting = layer | {f"model.layers.{count}.eh_proj.weight": np.zeros((32, 64), np.float32)}
    shutil.copytree(GOLDEN / family, tmp_path / "more")
    save_file(tensors | predicting, tmp_path / "more" / "model.safetensors")
    assert_same(load(tmp_path / "more"), load(GOLDEN / family))
    save_file(tensors | layer, tmp_path / "more" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"'model\.layers\.{count}\..*' is not one of"):
        load(tmp_path / "more")
