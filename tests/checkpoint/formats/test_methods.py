"""Published configurations give each module its format; what is not read is refused by name."""

import copy
import time
from pathlib import Path
from typing import Any

import pytest
from support.models import compressed as ct
from support.models.published_quantisation import (
    BLOCKS,
    GLM_45_AIR_FP8,
    GPT_OSS,
    INT4_G32,
    KIMI_K3,
    KIMI_K25,
    MINIMAX_M2,
    MIXED,
    QWEN3_30B_FP8,
    REDHAT_FP8_DYNAMIC,
    TOKENS,
    W4A16_AWQ,
    compressed,
    group,
    weights_of,
)

from jmoe.checkpoint.quantised.formats import Format
from jmoe.checkpoint.quantised.formats.fp8 import Fp8
from jmoe.checkpoint.quantised.formats.int8 import Int8
from jmoe.checkpoint.quantised.formats.mxfp4 import IN_BLOCKS, IN_ROWS
from jmoe.checkpoint.quantised.formats.nvfp4 import Nvfp4
from jmoe.checkpoint.quantised.formats.packed_ints import PackedInts
from jmoe.checkpoint.quantised.methods import METHODS
from jmoe.checkpoint.quantised.quantisation import Quantisation, parsed

PATH = Path("config.json")
EXPERT, Q_PROJ = "model.layers.5.mlp.experts.7.down_proj.weight", "model.layers.5.self_attn.q_proj.weight"
GATE, SHARED = "model.layers.5.mlp.gate.weight", "model.layers.5.mlp.shared_experts.up_proj.weight"
HEAD, DENSE = "lm_head.weight", "model.layers.0.mlp.gate_proj.weight"


def formats(quantisation: Quantisation, *names: str) -> tuple[Format | None, ...]:
    rules = [quantisation.rule_of(name) for name in names]
    return tuple(None if rule is None else rule.format for rule in rules)


FP8_BLOCKS = Fp8((128, 128), "_scale_inv")
ROWS, INT4, ASYMMETRIC = (
    Fp8((1, None), "_scale"),
    PackedInts((1, 32), bits=4),
    PackedInts((1, 128), True, bits=4),
)
PUBLISHED = {  # the formats of an expert, attention, the router, a shared expert, the head, a dense MLP
    "Qwen3-30B-A3B-FP8": (QWEN3_30B_FP8, (FP8_BLOCKS, FP8_BLOCKS, None, FP8_BLOCKS, None, FP8_BLOCKS)),
    "DeepSeek-V3, Kimi-K2-Instruct": (BLOCKS, (FP8_BLOCKS,) * 6),  # routers and head are plain all the same
    "MiniMax-M2": (MINIMAX_M2, (FP8_BLOCKS, FP8_BLOCKS, None, FP8_BLOCKS, None, FP8_BLOCKS)),
    "Kimi-K2.5": (KIMI_K25, (INT4, None, INT4, None, None, None)),
    "GLM-4.5-Air-FP8": (GLM_45_AIR_FP8, (ROWS, ROWS, None, ROWS, None, ROWS)),
    "RedHatAI, FP8-dynamic": (REDHAT_FP8_DYNAMIC, (ROWS, ROWS, None, ROWS, None, ROWS)),
    "AWQ by llm-compressor": (W4A16_AWQ, (ASYMMETRIC, ASYMMETRIC, None, ASYMMETRIC, None, ASYMMETRIC)),
    "Kimi-K3": (KIMI_K3, (IN_ROWS, None, None, IN_ROWS, None, IN_ROWS)),
    "gpt-oss": (GPT_OSS, (None,) * 6),
    "mixed": (MIXED, (
        Nvfp4("_scale", "_global_scale", False, "_packed"), Int8((1, None)), None, Fp8((128, 128), "_scale"),
        None, Fp8((128, 128), "_scale"),
    )),
}  # fmt: skip


@pytest.mark.parametrize("release", PUBLISHED)
def test_published_configurations(release):
    config, want = PUBLISHED[release]
    found = parsed(config, PATH)
    assert formats(found, EXPERT, Q_PROJ, GATE, SHARED, HEAD, DENSE) == want
    wrapped = [
        name if name == HEAD else name.replace("model.", "model.language_model.", 1)
        for name in (EXPERT, Q_PROJ, GATE, SHARED, HEAD, DENSE)
    ]
    assert formats(found, *wrapped) == want or release == "mixed"  # which names a module by its full name


def test_gpt_oss_experts_alone():
    found = parsed(GPT_OSS, PATH)
    names = [f"model.layers.3.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    assert formats(found, *names) == (IN_BLOCKS, IN_BLOCKS)
    assert formats(found, f"{names[0]}_bias", "model.layers.3.mlp.router.weight") == (None, None)


@pytest.mark.parametrize("case", ct.CASES)
def test_every_case_has_a_format(case):
    assert formats(parsed(ct.CASES[case].config("lm_head"), PATH), Q_PROJ, HEAD)[1] is None
    assert isinstance(formats(parsed(ct.CASES[case].config(), PATH), Q_PROJ)[0], Format)


def test_dense_groups_and_groups_without_weights_are_plain():
    only = group(INT4_G32, "re:.*experts.*")
    dense = group(weights_of(8, "int", "channel"), "re:.*q_proj", format="dense")
    cache = {"targets": ["LlamaAttention"], "weights": None, "input_activations": TOKENS}
    found = parsed(compressed("pack-quantized", only, dense, cache), PATH)
    assert formats(found, EXPERT, Q_PROJ, HEAD) == (INT4, None, None)
    assert found.rule_of(HEAD) is None


def test_strategies_that_are_not_named_and_old_spellings():
    def format_of(**weights: Any) -> Format | None:
        values = {"num_bits": 8, "type": "int"} | weights
        return formats(parsed(compressed("int-quantized", group(values)), PATH), Q_PROJ)[0]

    assert format_of() == Int8((None, None))
    assert format_of(group_size=-1) == format_of(strategy="channel", group_size=-1) == Int8((1, None))
    assert format_of(group_size=64) == Int8((1, 64))
    assert format_of(strategy="channel", actorder=False) == format_of(strategy="channel", actorder="static")


def test_long_lists_take_no_time():
    """Of a model of tens of thousands of experts, every module may be named."""
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{p}_proj"
        for i in range(60)
        for e in range(128)
        for p in ("gate", "up", "down")
    ]
    found = parsed(compressed("pack-quantized", group(INT4_G32), ignore=names[::2]), PATH)
    start = time.process_time()
    got = formats(found, *(f"{name}.weight" for name in names))
    assert got == tuple(None if i % 2 == 0 else INT4 for i in range(len(names)))
    assert time.process_time() - start < 5


def with_weights(kind: str = "pack-quantized", **changes: Any) -> dict[str, Any]:
    return compressed(kind, group(INT4_G32 | changes))


IN_WEIGHTS = "config_groups.group_0: weights: "


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("int4", "method 'int4' is not read; " + ", ".join(map(repr, METHODS)) + " are"),
        (4, "it must be an object, it is 4"),
        ({"quant_method": "exl3"}, "method 'exl3' is not read; " + ", ".join(map(repr, METHODS)) + " are"),
        (
            compressed("marlin-24", group(INT4_G32)),
            "config_groups.group_0: format 'marlin-24' is not read; 'pack-quantized', ",
        ),
        (
            compressed(None, group(INT4_G32)),
            "config_groups.group_0: format None is not read; 'pack-quantized', ",
        ),
        (compressed("mixed-precision", group(INT4_G32)), "'dense' are (each group must say its own)"),
        (compressed("pack-quantized"), "config_groups must be an object of groups, got {}"),
        (
            compressed("pack-quantized", config_groups={"W4A16": ["Linear"]}),
            "config_groups.W4A16: it must be an object, got ['Linear']",
        ),
        (
            compressed("pack-quantized", group(INT4_G32), ignore=[3]),
            "ignore must be a list of names of modules, got [3]",
        ),
        (
            compressed("pack-quantized", group(INT4_G32, "Conv2d")),
            "targets: class 'Conv2d' is not read; Linear, Embedding, names of modules and 're:' patterns are",
        ),
        (compressed("pack-quantized", group(INT4_G32, "re:(")), "'re:(' is not a regular expression: "),
        (
            compressed("pack-quantized", group(INT4_G32, layers=[1])),
            "it: unknown key 'layers'; nearest known key: ",
        ),
        (compressed("pack-quantized", group([4])), IN_WEIGHTS + "it must be an object, got [4]"),
        (
            compressed("pack-quantized", group(INT4_G32), rotation="hadamard"),
            "it: unknown key 'rotation'; nearest known key: ",
        ),
        (
            compressed(
                "pack-quantized",
                group(INT4_G32),
                transform_config={"config_groups": {"v": {"type": "hadamard"}}},
            ),
            "transform_config: rotated weights are not read",
        ),
        (
            compressed("pack-quantized", group(INT4_G32), sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config.format 'sparse-24-bitmask' is not read, 'dense' is",
        ),
        (
            compressed("pack-quantized", group(INT4_G32), quantization_status="sliced"),
            "quantization_status 'sliced' is not read; 'compressed', ",
        ),
        (with_weights(num_bits=3), IN_WEIGHTS + "num_bits must be one of 4, 8, got 3"),
        (with_weights(num_bits="4"), IN_WEIGHTS + "num_bits must be one of 4, 8, got '4'"),
        (with_weights(type="nf4"), IN_WEIGHTS + "type must be one of int, float, got 'nf4'"),
        (
            with_weights(type="float"),
            IN_WEIGHTS + "type 'float' is not read with format 'pack-quantized'; 'int' is",
        ),
        (
            with_weights(strategy="token"),
            IN_WEIGHTS + "strategy must be one of tensor, channel, group, block, tensor_group, got",
        ),
        (with_weights(group_size=0), IN_WEIGHTS + "group_size must be an integer from 1 to 65536, got 0"),
        (with_weights(group_size=-1), IN_WEIGHTS + "group_size must be an integer from 1 to 65536, got -1"),
        (with_weights(group_size=None), IN_WEIGHTS + "group_size None does not fit strategy 'group'"),
        (with_weights(strategy="channel"), IN_WEIGHTS + "group_size 32 does not fit strategy 'channel'"),
        (
            with_weights(actorder="group"),
            IN_WEIGHTS + "actorder must be one of None, static, weight, got 'group'",
        ),
        (with_weights(dynamic=True), IN_WEIGHTS + "dynamic must be "),
        (with_weights(symmetric="no"), IN_WEIGHTS + "symmetric must be true or false, got 'no'"),
        (with_weights(codebook=[1]), IN_WEIGHTS + "it: unknown key 'codebook'; nearest known key: "),
        (
            with_weights(scale_dtype="torch.uint8"),
            IN_WEIGHTS
            + "scale_dtype 'torch.uint8' is not read with format 'pack-quantized'; None or 'torch.bfloat16'",
        ),
        (
            with_weights("int-quantized", strategy="tensor", group_size=None, symmetric=False),
            "symmetric False is not read with type 'int' and strategy 'tensor'; True is",
        ),
        (
            with_weights("nvfp4-pack-quantized", type="float"),
            IN_WEIGHTS + "strategy 'group' is not read with format 'nvfp4-pack-quantized'; 'tensor_group' is",
        ),
        (
            with_weights("nvfp4-pack-quantized", type="float", strategy="tensor_group"),
            IN_WEIGHTS + "group_size 32 is not read with format 'nvfp4-pack-quantized'; 16 is",
        ),
        (
            with_weights("mxfp8-quantized", type="float"),
            IN_WEIGHTS + "num_bits 4 is not read with format 'mxfp8-quantized'; 8 is",
        ),
        (
            with_weights("float-quantized", type="float"),
            IN_WEIGHTS + "num_bits 4 is not read with format 'float-quantized'; 8 is",
        ),
        (
            with_weights(strategy="block", group_size=None),
            IN_WEIGHTS + "block_structure None does not fit strategy 'block'",
        ),
        (
            with_weights(
                "int-quantized", num_bits=8, strategy="block", group_size=None, block_structure=[128]
            ),
            "block_structure must be two numbers, got [128]",
        ),
        (
            BLOCKS | {"weight_block_size": [0, 128]},
            "weight_block_size must be two numbers from 1 to 65536, got [0, 128]",
        ),
        (BLOCKS | {"weight_block_size": None}, "weight_block_size is absent; fp8 is read in blocks"),
        (BLOCKS | {"fmt": "e5m2"}, "fmt 'e5m2' is not read, 'e4m3' is"),
        (
            BLOCKS | {"modules_to_not_convert": "lm_head"},
            "modules_to_not_convert must be a list of names of modules, got 'lm_head'",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(config, message):
    with pytest.raises(ValueError) as error:
        parsed(config, PATH)
    text = str(error.value)
    assert text.startswith("config.json: quantization_config: ") and message in text and "\n" not in text


WRONG = (None, 5, -1, 10**30, 0.5, True, "x", "", [], ["x"], [[]], {}, {"a": 1}, {"config_groups": [1]})


@pytest.mark.parametrize("place", ["top", "group", "weights"])
def test_values_of_any_type_are_read_or_refused_in_one_line(place):
    for base in (W4A16_AWQ, MIXED, BLOCKS, GPT_OSS):
        groups = base.get("config_groups", {"group_0": {"weights": {}}})
        inner = {"top": base, "group": groups["group_0"], "weights": groups["group_0"]["weights"]}[place]
        for key in inner:
            for wrong in WRONG:
                changed = copy.deepcopy(base)
                group = changed.get("config_groups", {}).get("group_0", {})
                {"top": changed, "group": group, "weights": group.get("weights", {})}[place][key] = wrong
                try:
                    formats(parsed(changed, PATH), EXPERT, Q_PROJ)
                except ValueError as error:
                    assert "\n" not in str(error) and len(str(error)) < 500
