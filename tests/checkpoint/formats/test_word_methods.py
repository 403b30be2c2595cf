"""Which module has which format by configurations of GPTQ, AWQ and AutoRound; others are refused by name."""

from pathlib import Path

import pytest

from jmoe.checkpoint.quantised.formats.awq import Awq
from jmoe.checkpoint.quantised.formats.format import Format
from jmoe.checkpoint.quantised.formats.gptq import Gptq
from jmoe.checkpoint.quantised.quantisation import Quantisation, parsed

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
ROUND = {
    "quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int",
    "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers",
}  # fmt: skip
FOUR, EIGHT = Gptq(4, 128, True), Gptq(8, 128, True)
EXPERT, QUERY, GATE = (
    f"model.layers.3.{name}" for name in ("mlp.experts.5.up_proj", "self_attn.q_proj", "mlp.gate")
)


def said(config: dict) -> Quantisation:
    return parsed(config, Path("config.json"))


def formats(config: dict, *modules: str) -> list[Format | None]:
    rules = [said(config).rule_of(f"{module}.weight") for module in modules]
    return [None if rule is None else rule.format for rule in rules]


def test_qwen3_30b_in_gptq():
    """Qwen/Qwen3-30B-A3B-GPTQ-Int4, as GPTQModel writes it."""
    config = GPTQ | {
        "checkpoint_format": "gptq", "lm_head": False, "pack_dtype": "int32", "true_sequential": True,
        "meta": {"damp_percent": 0.01, "mse": 0.0, "quantizer": ["gptqmodel:2.2.0"], "static_groups": False},
    }  # fmt: skip
    assert formats(config, EXPERT, QUERY, "lm_head") == [FOUR, FOUR, None]


def test_qwen35_in_gptq_leaves_attention_plain():
    """Qwen's later GPTQ releases: rules with "-:", and a head that has the same format if it has any."""
    dynamic = {"-:.*attn.*": {}, "-:.*mtp.*": True, "-:.*shared_expert.*": {}, "lm_head": True}
    found = formats(
        GPTQ | {"dynamic": dynamic}, EXPERT, QUERY, "lm_head", "mtp.layers.0.mlp.experts.0.up_proj"
    )
    assert found == [FOUR, None, FOUR, None]


def test_a_mixture_of_bits_in_gptq():
    """QuantTrio's Int4-Int8Mix: the first rule that matches decides."""
    dynamic = {
        r"-:.*\.mlp\.gate$": {},
        r"+:.*self_attn.*": {"bits": 8},
        r"model\.layers\.3\.mlp\.experts\.5\..*": {"bits": 8, "group_size": 64, "sym": False},
        r"+:.*experts.*": {"desc_act": True},
    }
    found = formats(GPTQ | {"dynamic": dynamic}, EXPERT, QUERY, GATE, "model.layers.3.mlp.experts.50.up_proj")
    assert found == [Gptq(8, 64, False), EIGHT, None, Gptq(4, 128, True, has_any_order=True)]


def test_modules_in_block_to_quantize():
    """Qwen/Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4 lists the modules of a layer, in lists of lists."""
    listed = [["self_attn.k_proj", "self_attn.q_proj"], ["mlp.experts.5.up_proj"]]
    config = GPTQ | {"modules_in_block_to_quantize": listed}
    others = (GATE, "model.layers.3.self_attn.o_proj", "model.layers.3.mlp.experts.15.up_proj")
    assert formats(config, EXPERT, QUERY, *others) == [FOUR, FOUR, None, None, None]


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"checkpoint_format": "gptq_v2"}, Gptq(4, 128, True, stores_less_one=False)),
        ({"sym": False, "group_size": -1}, Gptq(4, None, False)),
        ({"desc_act": True, "bits": 8}, Gptq(8, 128, True, has_any_order=True)),
        ({"dynamic": None, "modules_in_block_to_quantize": None, "sym": None}, FOUR),
    ],
)
def test_the_numbers_of_gptq(changes, want):
    assert formats(GPTQ | changes, EXPERT) == [want]


def test_qwen3_30b_in_awq():
    """QuantTrio/Qwen3-30B-A3B-Instruct-2507-AWQ and AutoAWQ's own; an entry stands anywhere in a name."""
    config = AWQ | {"modules_to_not_convert": ["mlp.gate", "model.layers.0."]}
    stored = Awq(128, is_symmetric=False)
    first = "model.layers.0.self_attn.q_proj"
    assert formats(config, EXPERT, QUERY, GATE, first) == [stored, stored, None, None]
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": False, "version": "GEMM"}
    assert formats(old | {"modules_to_not_convert": None}, EXPERT) == [Awq(64, is_symmetric=True)]


def test_auto_round():
    """Intel's int4 releases: bits by module in "extra_config", by name or by regular expression."""
    extra = {
        GATE: {"bits": 16, "data_type": "float"},
        "model.layers.3.self_attn": {"bits": 8},
        r"layers\.7\.self_\w+": {"bits": 16},
        "lm_head": {"bits": 8, "group_size": 32, "sym": False},
    }
    other = "model.layers.7.self_attn.k_proj"
    config = ROUND | {"extra_config": extra, "autoround_version": "0.9.5"}
    found = formats(config, EXPERT, QUERY, GATE, other, "lm_head", "model.layers.7.mlp.gate")
    assert found == [FOUR, EIGHT, None, None, Gptq(8, 32, False), FOUR]
    assert formats(ROUND, "lm_head", "model.embed_tokens") == [None, None]
    blocks = {"block_name_to_quantize": None, "to_quant_block_names": ["model.layers", "mtp.layers"]}
    assert formats(ROUND | blocks | {"quant_method": "intel/auto-round"}, EXPERT, "lm_head") == [FOUR, None]
    in_awq = ROUND | {"packing_format": "auto_round:auto_awq", "sym": False}
    assert formats(in_awq, EXPERT) == [Awq(128, is_symmetric=False)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTQ | {"bits": 3}, "bits 3 is not read; read: 4, 8"),
        (GPTQ | {"bits": True}, "bits True is not read"),
        (GPTQ | {"bits": None}, "bits is absent"),
        (GPTQ | {"group_size": 0}, "group_size must be -1 or at least 1, got 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read; read: 'gptq', "),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format True is not read"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype 'int16' is not read"),
        (GPTQ | {"rotation": "hadamard"}, "rotation 'hadamard' is not read"),
        (GPTQ | {"sym": "yes"}, "sym 'yes' is not read"),
        (GPTQ | {"dynamic": ["a"]}, r"dynamic must be an object, got \['a'\]"),
        (GPTQ | {"dynamic": {"-:(": {}}}, r"dynamic: '-:\(': .*is not a regular expression"),
        (GPTQ | {"dynamic": {"a": {"bits": 2}}}, "dynamic: 'a': bits 2 is not read"),
        (GPTQ | {"dynamic": {"a": 2}}, "dynamic: 'a': it must be an object, got 2"),
        (GPTQ | {"modules_in_block_to_quantize": [[3]]}, "modules_in_block_to_quantize must be a list"),
        (AWQ | {"version": "gemv"}, "version 'gemv' is not read, 'gemm' is"),
        (AWQ | {"version": 3}, "version 3 is not read"),
        (AWQ | {"bits": 8}, "bits 8 is not read; read: 4"),
        (AWQ | {"backend": "llm-awq"}, "backend 'llm-awq' is not read"),
        (ROUND | {"packing_format": "auto_round:marlin"}, "packing_format 'auto_round:marlin' is not read"),
        (ROUND | {"data_type": "mx_fp"}, "data_type 'mx_fp' is not read; read: 'int'"),
        (ROUND | {"extra_config": {"a.b": 3}}, "extra_config: 'a.b': it must be an object, got 3"),
        (ROUND | {"extra_config": {"a.b": {"bits": 2}}}, "extra_config: 'a.b': bits 2 is not read"),
        (
            ROUND | {"packing_format": "auto_round:auto_awq", "extra_config": {"a.b": {"bits": 8}}},
            "extra_config: 'a.b': bits 8 is not read; read: 4",
        ),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=rf"^config.json: quantization_config: {message}") as error:
        said(config)
    assert "\n" not in str(error.value)


FULL = (
    GPTQ | {"checkpoint_format": "gptq", "lm_head": False, "dynamic": {"-:a": {}, "b": {"bits": 8}},
            "modules_in_block_to_quantize": [["a"]], "modules_to_not_convert": ["a"], "pack_dtype": "int32",
            "is_marlin_format": False},
    AWQ | {"modules_to_not_convert": ["a"], "backend": "autoawq"},
    ROUND | {"extra_config": {"a": {"bits": 16}, "b.*": {"bits": 8}}},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["a"]},
    {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "exclude_modules": ["a*"],
     "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}}},
)  # fmt: skip
ODD = (
    None, 0, -7, 1.5, True, "x", "re:(", "*", "\n", [], [1], [["a"], 3], ["re:(", "*["], {}, {"a": 1},
    {"(": {"bits": [1]}}, {"a": {"quant_algo": []}}, 10**400, "y" * 9999, [[[]]],
    {"\n" * 9999: {"bits": 2}}, ["\n"],
)  # fmt: skip


@pytest.mark.parametrize("config", FULL, ids=lambda config: config["quant_method"])
def test_an_odd_value_of_any_key_is_read_or_refused_in_one_line(config):
    for key in config:
        for value in ODD:
            try:
                formats(config | {key: value}, EXPERT, QUERY, "lm_head")
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 700, (key, value)
