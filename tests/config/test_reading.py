"""Every value of every file, flag and argument has one form of message. The tests also check the values."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
from msgspec import Meta
from support.least_time import within

from jmoe import LLM, SamplingParams
from jmoe.checkpoint import read_config
from jmoe.checkpoint.facts import end_tokens
from jmoe.cli.flags import read_serve_config
from jmoe.cli.main import main
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.reading import AtLeastOne, Positive, Size, typed, unique_json
from jmoe.config.units import parse_size, readable
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.models import model_config
from jmoe.server.settings import ServerSettings

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    ("kind", "value", "want"),
    [
        (AtLeastOne, 7, 7), (AtLeastOne | None, None, None), (float, 3, 3.0), (Positive, 1, 1.0),
        (AtLeastOne, np.int64(7), 7), (tuple[int, ...], [1, 2], (1, 2)), (Size, "1.5KiB", 1536),
        (Size, 77, 77),
        (Size | None, "2TiB", 2 << 40), (Literal["a", "b"], "b", "b"), (int | tuple[int, ...], [3], (3,)),
    ],
)  # fmt: skip
def test_a_value_of_the_declared_type_is_taken(kind, value, want):
    got = typed("x", value, kind)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (AtLeastOne, "8", "x must be an integer of at least 1, got '8'"),
        (AtLeastOne, True, "got True"), (AtLeastOne, 1.0, "got 1.0"), (AtLeastOne, 0, "got 0"),
        (AtLeastOne, None, "got None"), (Annotated[int, Meta(le=16)], 1 << 400, "an integer of 401 bits"),
        (int, [], "x must be an integer"),
        (Annotated[int, Meta(ge=1, le=16)], 17, "x must be an integer from 1 to 16, got 17"),
        (Annotated[float, Meta(gt=0, lt=1)], 1, "x must be a finite number above 0 below 1, got 1"),
        (float, float("nan"), "x must be a finite number, got nan"), (float, 10**400, "x must be a finite"),
        (float | None, float("-inf"), "got -inf"), (Positive, 1e-320, "got 1e-320 (in float32)"),
        (bool, "no", "x must be true or false, got 'no'"), (bool, 0, "got 0"),
        (str, 5, "x must be text, got 5"),
        (Literal["a", "b"], "c", "x must be one of a, b, got 'c'"),
        (Literal["a"] | None, ["a"], "x must be one of None, a, got ['a']"),
        (tuple[int, ...], "12", "x must be a list, got '12'"),
        (tuple[int, ...], [1, [2]], "x[1] must be an integer, got [2]"),
        (tuple[float, ...], [1, float("nan")], "x[1] must be a finite number, got nan"),
        (Size, "-1GiB", "x: '-1GiB' is not a size such as 2GiB"), (Size, "\uff19", "is not a size"),
        (Size, "9" * 400, "is not a size"), (Size, 1.5, "x must be an integer of at least 1, got 1.5"),
        (str, "y" * 10**6, None),
    ],
)  # fmt: skip
def test_another_one_is_refused_in_one_line(kind, value, message):
    if message is None:
        assert typed("x", value, kind) == value
        return
    with pytest.raises(ValueError) as caught:
        typed("x", value, kind)
    text = str(caught.value)
    assert message in text and "\n" not in text and len(text) < 300


def test_a_deep_or_long_value_is_shown_in_one_short_line():
    deep: list = []
    for _ in range(900):
        deep = [deep]
    for value in (deep, {"a": deep}, ["x" * 10**6] * 1000, "l\nm", np.zeros((30, 30))):
        with pytest.raises(ValueError) as caught:
            typed("x", value, int)
        assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value)


SERVE = [
    ('port = "8000"', "port must be an integer from 0 to 65535, got '8000'"),
    ("port = 70000", "port must be an integer from 0 to 65535, got 70000"),
    ("max_num_seqs = 4.0", "max_num_seqs must be an integer from 1 to 65536, got 4.0"),
    ("max_num_seqs = 1000000000000", "from 1 to 65536, got 1000000000000"),
    ('enable_prefix_caching = "no"', "enable_prefix_caching must be true or false, got 'no'"),
    ('max_model_len = "64"', "max_model_len must be an integer of at least 1, got '64'"),
    ("request_timeout = nan", "request_timeout must be above 0 seconds"),
    ('shutdown_timeout = "x"', "shutdown_timeout must be at least 0 seconds"),
    ("api_key = 12345", "api_key must be text, got int"),
    ("served_model_name = [1]", "served_model_name[0] must be text, got 1"),
    ("kv_memory = 1.5", "kv_memory must be an integer of at least 1, got 1.5"),
    ('kv_memory = "lots"', "kv_memory: 'lots' is not a size such as 2GiB"),
    ('dispatch = "prefix"', "dispatch must be a list, got 'prefix'"),
    ("otlp_traces_endpoint = 1", "otlp_traces_endpoint must be text, got 1"),
    ('log_level = "loud"', "log_level must be one of debug, info, warning, error, got 'loud'"),
    ("moe = 5", "moe config must be a table of keys, got int"),
    ("[moe.capacity]\nfactor = 2020-01-01",
     "moe.capacity.factor must be a finite number above 0, got datetime"),
    ("[moe.binning]\nbin_width = true", "moe.binning.bin_width must be a finite number above 0, got True"),
    ("json = true", "unknown key 'json'"),
    ("port = 1\nport = 2", "Cannot overwrite a value"),
    ("x = " + "[" * 5000, "recursion"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), SERVE, ids=[line[:25] for line, _ in SERVE])
def test_a_serve_config_is_refused_with_file_and_key(tmp_path, capsys, line: str, message: str):
    path = tmp_path / "serve.toml"
    path.write_text(line + "\n")
    assert main(["serve", "tiny", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(path) in err and message in err and "12345" not in err


def test_the_file_and_the_flags_become_the_same_settings(tmp_path):
    path = tmp_path / "serve.toml"
    path.write_text('kv_memory = "96MiB"\nrequest_timeout = 5\ndispatch = ["load", "prefix", "experts"]\n')
    values = read_serve_config(path)
    assert values["kv_memory"] == EngineSettings(kv_memory="96MiB").kv_memory == 96 << 20  # pyright: ignore
    assert values["request_timeout"] == 5.0 and values["dispatch"] == ("load", "prefix", "experts")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--port", "x"), "argument --port: must be an integer, got 'x'"),
        (("--port", "1_000"), "must be an integer"), (("--port", "\uff18\uff10"), "must be an integer"),
        (("--request-timeout", "soon"), "must be a number, got 'soon'"),
        (("--request-timeout", "nan"), "request_timeout must be above 0 seconds"),
        (("--max-num-seqs", "1000000000000"), "max_num_seqs must be an integer from 1 to 65536"),
        (("--kv-memory", "9000GiB"), "the model does not fit the memory: weights 24.4 MiB + a step"),
        (("--moe-config", '{"capacity": {"factor": 1, "factor": 2}}'), "'factor' is given twice"),
        (("--json",), "unrecognized arguments: --json"),
        (("--node-rank", "0"), "node_rank is for several processes"),
    ],
)  # fmt: skip
def test_flags_are_refused_in_the_same_words(capsys, flags, message):
    try:
        code = main(["serve", "tiny", "--port", "0", *flags])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]  # a log line may come before it
    assert code == 2 and out == "" and message in last and "Traceback" not in err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kv_memory": "much"}, "kv_memory: 'much' is not a size"), ({"kv_memory": -1}, "kv_memory must be"),
        ({"max_num_seqs": "4"}, "max_num_seqs must be an integer from 1 to 65536, got '4'"),
        ({"max_num_seqs": True}, "got True"), ({"max_model_len": 1.5}, "max_model_len must be an integer"),
        ({"dtype": "float16"}, "dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ({"moe": {}}, "moe must be a MoEConfig, got {}"),
        ({"dispatch": ("x",)}, "dispatch[0] must be one of"),
        ({"warm_up": "no"}, "warm_up must be true or false"),
        ({"max_seqs": 4}, "nearest known key: 'max_num_seqs'"),
        ({"model": 5}, "a model is a name or a directory, got 5"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_LLM_are_refused_in_the_same_words(values, message):
    with pytest.raises(ValueError) as caught:
        LLM(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"max_tokens": "5"}, {"temperature": "hot"}, {"stop": "END"}, {"seed": 1.5},
     {"ignore_eos": "no"}]
)  # fmt: skip
def test_sampling_parameters_have_types(values):
    [name] = values
    with pytest.raises(ValueError, match=f"^{name} must be "):
        SamplingParams(**values)


# ---- settings that would do nothing ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"offload": {"store_size": 5}},
         "moe.offload.store_size = 5 has no effect with predictor 'next_gate'"),
        ({"offload": {"store_size": 5, "predictor": "counts"}}, "it needs one of expert_map"),
        ({"offload": {"prefetch_distance": 2, "predictor": "none"}}, "has no effect with predictor 'none'"),
        ({"offload": {"prefetch_per_layer": 2, "predictor": "none"}}, "has no effect with predictor 'none'"),
        ({"offload": {"prefetch_distance": None}},
         "prefetch_distance must be an integer of at least 1, got None"),
        ({"offload": {"store_size": None}}, "store_size must be an integer of at least 1, got None"),
    ],
    ids=str,
)  # fmt: skip
def test_a_key_that_nothing_reads_is_refused(moe, message):
    moe = {"offload": {"slots_per_layer": 4} | moe["offload"]}
    for read in (MoEConfig.from_dict, lambda values: MoEConfig.from_text(json.dumps(values))):
        with pytest.raises(ValueError) as caught:
            read(moe)
        assert message in str(caught.value)


def test_limits_of_the_model_are_limits_of_offloading():
    offload = MoEConfig.from_dict({"offload": {"slots_per_layer": 2, "prefetch_distance": 5}}).offload
    assert offload is not None
    sizes = {"layers": 4, "experts": 8, "k": 2, "expert_bytes": 100}
    with pytest.raises(
        ValueError, match="prefetch_distance must be at most the 4 layers that have experts, got"
    ):
        offload.slots(**sizes)
    many = dataclasses.replace(offload, prefetch_distance=4, prefetch_per_layer=10**12)
    with pytest.raises(ValueError, match="prefetch_per_layer must be at most the 8 experts of a layer"):
        many.slots(**sizes)
    assert dataclasses.replace(many, prefetch_per_layer=8).slots(**sizes) == 8


def test_dispatch_by_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"'experts' has no effect without moe\.shuffle\.requests"):
        EngineSettings(dispatch=("experts", "load"))
    with pytest.raises(ValueError, match="'prefix' has no effect without enable_prefix_caching"):
        EngineSettings(dispatch=("prefix",), enable_prefix_caching=False)
    EngineSettings(enable_prefix_caching=False)


def test_what_does_nothing_on_this_mesh_is_said():
    settings = EngineSettings(
        moe=MoEConfig(transport="all_to_all"), attention="tp", dispatch=("load", "prefix")
    )
    one, two = settings.without_effect(1, 1, 1), settings.without_effect(1, 2, 1)
    assert [line.split(" has no effect")[0] for line in one] == [
        "moe.transport = 'all_to_all'", "attention = 'tp'", "dispatch",
    ]  # fmt: skip
    assert [line.split()[0] for line in two] == ["dispatch"]
    assert EngineSettings().without_effect(1, 1, 1) == []


# ---- config.json -----------------------------------------------------------------------------------


def golden(family: str, **changes) -> dict:
    return json.loads((GOLDEN / family / "config.json").read_text()) | changes


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
YARN = LLAMA3 | {"rope_type": "yarn"}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmoe", {"clip_qkv": "x"}, "clip_qkv must be a finite number above 0, got 'x'"),
        ("olmoe", {"rms_norm_eps": True}, "rms_norm_eps must be a finite number above 0, got True"),
        ("olmoe", {"eos_token_id": [[1]]}, "eos_token_id[0] must be an integer"),
        ("olmoe", {"eos_token_id": "x"}, "eos_token_id must be an integer"),
        ("olmoe", {"architectures": {"a": 1}}, "architectures must be a list, got {'a': 1}"),
        ("olmoe", {"architectures": [["OlmoeForCausalLM"]]}, "architectures[0] must be text"),
        ("olmoe", {"rope_parameters": LLAMA3 | {"low_freq_factor": "1"}},
         "rope_parameters.low_freq_factor must"),
        ("olmoe", {"rope_parameters": YARN | {"beta_fast": "32"}}, "rope_parameters.beta_fast must be"),
        ("olmoe", {"rope_parameters": YARN | {"original_max_position_embeddings": -64}}, "got -64"),
        ("olmoe", {"rope_parameters": YARN | {"rope_theta": 1.0}}, "needs a rope_theta above 1, got 1.0"),
        ("olmoe", {"rope_parameters": None, "rope_scaling": "x"}, "rope_scaling must be a table of keys"),
        ("olmoe", {"max_position_embeddings": 10**400, "rope_parameters": YARN}, "exceeds 2147483647"),
        ("granitemoe", {"logits_scaling": 0.0}, "logits_scaling must be a finite number above 0, got 0.0"),
        ("granitemoe", {"attention_multiplier": float("nan")}, "attention_multiplier must be"),
        ("granitemoe", {"residual_multiplier": float("inf")}, "residual_multiplier must be"),
        ("granitemoe", {"embedding_multiplier": 1e-320}, "embedding_multiplier must be"),
        ("qwen3_moe", {"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ("qwen3_moe", {"hidden_size": -24}, "hidden_size must be a positive integer, got -24"),
        ("qwen3_moe", {"vocab_size": 2**63}, "vocab_size 9223372036854775808 exceeds 2147483647"),
        ("qwen3_moe", {"norm_topk_prob": "no"}, "norm_topk_prob must be true or false, got 'no'"),
        ("qwen3_moe", {"mlp_only_layers": [-1]},
         "mlp_only_layers[0] must be an integer of at least 0, got -1"),
        ("qwen3_moe", {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ("deepseek_v3", {"routed_scaling_factor": None}, "config.json has no 'routed_scaling_factor'"),
        ("deepseek_v3", {"n_group": 0}, "n_group must be a positive integer, got 0"),
        ("deepseek_v3", {"first_k_dense_replace": None}, "has no 'first_k_dense_replace'"),
        ("llama4", {"interleave_moe_layer_step": 0}, "interleave_moe_layer_step must be a positive integer"),
        ("gpt_oss", {"layer_types": ["full_attention", 5]}, "layer_types[1] must be one of full_attention"),
        ("phimoe", {"router_jitter_noise": -1}, "router_jitter_noise must be a finite number of at least 0"),
        ("mixtral", {"sliding_window": "4"}, "sliding_window must be a positive integer, got '4'"),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_fields_of_config_json_have_types_at_any_depth(tmp_path, family: str, changes: dict, message: str):
    (tmp_path / "config.json").write_text(json.dumps(golden(family, **changes)))
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "same"),
    [
        ("deepseek_v3", {"n_group": None, "topk_group": None}, {"n_group": 1, "topk_group": 1}),
        ("glm4_moe", {"n_group": None}, {"n_group": 1}),
        ("qwen3_moe", {"mlp_only_layers": None, "rope_scaling": None, "decoder_sparse_step": None}, {}),
        ("qwen3_moe", {"n_group": "unread", "kv_lora_rank": [], "clip_qkv": -1}, {}),
        ("granitemoe", {"logits_scaling": 4}, {"logits_scaling": 4.0}),
        ("olmoe", {"head_dim": None, "clip_qkv": None}, {}),
    ],
)  # fmt: skip
def test_null_and_what_no_family_reads_may_stand(family: str, changes: dict, same: dict):
    assert model_config(golden(family, **changes)) == model_config(golden(family, **same))


def test_generation_config_is_read_alike(tmp_path):
    cfg = model_config(golden("qwen3_moe"))
    for text, message in (
        ('{"eos_token_id": "x"}', "eos_token_id must be an integer"),
        ('{"eos_token_id": [1, true]}', r"eos_token_id\[1\] must be an integer"),
        ('{"eos_token_id": 1, "eos_token_id": 2}', "given twice"), ("[1]", "must be a JSON object"),
        ("[" * 10**5, "nested too deeply"),
    ):  # fmt: skip
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            end_tokens(tmp_path, cfg)


def test_models_in_toml_are_read_alike(tmp_path):
    path = tmp_path / "model.toml"
    good = (Path(__file__).parents[2] / "configs/model/mixtral-8x7b.toml").read_text()
    for old, new, message in (
        ("vocab_size = 32000", 'vocab_size = "32000"', "vocab_size must be a positive integer, got '32000'"),
        ("vocab_size = 32000", "", "model config has no 'vocab_size'"),
        ("vocab_size = 32000", "vocab_size = 0xffffffffffffffffffffffffff", "exceeds 2147483647"),
        ("num_hidden_layers = 32", "num_hidden_layers = 2000000", "num_hidden_layers 2000000 exceeds 10000"),
    ):
        assert old in good
        path.write_text(good.replace(old, new))
        with pytest.raises(ValueError) as caught:
            ModelConfig.from_file(path)
        assert str(path) in str(caught.value) and message in str(caught.value)


def test_duplicates_are_found_in_linear_time():
    text = "{" + ",".join(f'"{i}": 0' for i in range(100_000)) + ', "7": 1}'

    def find() -> None:
        with pytest.raises(ValueError, match="'7' is given twice"):
            unique_json(text)

    within(2.0, find)


def test_sizes_are_exact_and_readable():
    assert parse_size("x", "9007199254740993") == 9007199254740993
    assert [readable(n) for n in (5, 1536, 96 << 20, 1920 << 30)] == ["5 B", "1.5 KiB", "96 MiB", "1.88 TiB"]


def test_the_key_is_in_no_message():
    with pytest.raises(ValueError) as caught:
        ServerSettings(api_key=b"secret")  # pyright: ignore[reportArgumentType]
    assert "secret" not in str(caught.value)
