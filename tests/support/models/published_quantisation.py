"""The ``quantization_config`` of published checkpoints, restated."""

from typing import Any

BLOCKS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
NORMS = ("input_layernorm", "post_attention_layernorm", "mlp.gate")
QWEN3_30B_FP8 = {
    **BLOCKS,
    "modules_to_not_convert": [
        "lm_head",
        *[f"model.layers.{layer}.{module}" for layer in range(48) for module in NORMS],
    ],
}
MINIMAX_M2 = BLOCKS | {
    "fmt": "float8_e4m3fn",
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}
GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip


def group(weights: Any, *targets: str, **changes: Any) -> dict[str, Any]:
    return {
        "targets": list(targets or ("Linear",)), "weights": weights, "input_activations": None,
        "output_activations": None, **changes,
    }  # fmt: skip


def weights_of(
    bits: int, kind: str, strategy: str, group: int | None = None, **changes: Any
) -> dict[str, Any]:
    return {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": group, "num_bits": bits,
        "observer": "minmax", "observer_kwargs": {}, "strategy": strategy, "symmetric": True, "type": kind,
        **changes,
    }  # fmt: skip


def compressed(kind: str | None, *groups: dict[str, Any], ignore: Any = (), **changes: Any) -> dict[str, Any]:
    return {
        "config_groups": {f"group_{i}": each for i, each in enumerate(groups)},
        "format": kind,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        **changes,
    }


INT4_G32 = weights_of(4, "int", "group", 32)
KIMI_K25 = compressed(
    "pack-quantized",
    group(INT4_G32),
    ignore=[
        "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        "re:vision_tower.*", "re:mm_projector.*",
    ],
)  # fmt: skip
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
GLM_45_AIR_FP8 = compressed(
    "float-quantized",
    group(weights_of(8, "float", "channel"), input_activations=TOKENS),
    ignore=["lm_head", "model.embed_tokens", *[f"model.layers.{layer}.mlp.gate" for layer in range(1, 46)]],
    sparsity_config={},
    transform_config={},
    version="0.11.0",
)
REDHAT_FP8_DYNAMIC = compressed(
    "float-quantized",
    group(weights_of(8, "float", "channel"), input_activations=TOKENS),
    ignore=["re:.*lm_head", "re:.*mlp.gate$"],
    kv_cache_scheme=TOKENS | {"strategy": "tensor", "dynamic": False},
    quantization_status="frozen",
)
W4A16_AWQ = compressed(
    "pack-quantized",
    group(
        weights_of(4, "int", "group", 128, symmetric=False, zp_dtype="torch.int8"), format="pack-quantized"
    ),
    ignore=["lm_head", *[f"model.layers.{layer}.mlp.gate" for layer in range(48)]],
)
KIMI_K3 = compressed(
    "mxfp4-pack-quantized",
    group(
        weights_of(4, "float", "group", 32, scale_dtype="torch.uint8", zp_dtype="torch.uint8"),
        format="mxfp4-pack-quantized",
    ),
    ignore=["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
)
NVFP4 = weights_of(4, "float", "tensor_group", 16, scale_dtype="torch.float8_e4m3fn")
MIXED = compressed(
    "mixed-precision",
    group(weights_of(8, "float", "block", block_structure=[128, 128]), "Linear", format="float-quantized"),
    group(NVFP4, "re:.*mlp.experts.*", format="nvfp4-pack-quantized"),
    group(weights_of(8, "int", "channel"), "model.layers.5.self_attn.q_proj", format="int-quantized"),
    ignore=["lm_head", "re:.*mlp.gate$"],
)
