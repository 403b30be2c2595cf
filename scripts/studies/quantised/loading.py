"""Computes the part loading: bytes of weights on a rank, from the shapes of published models alone.

The experts are split over the ranks; attention is whole on each, as the engine has it by default. The codings
are those that the engine reads from the checkpoints' own ``quantization_config``.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from shared.layer_sizes import shape_path

from jmoe.blueprint import UNQUANTISED, Codings
from jmoe.checkpoint.params import abstract_decoder
from jmoe.checkpoint.quantised.codings import codings_of
from jmoe.checkpoint.quantised.formats import StoredParam
from jmoe.checkpoint.quantised.quantisation import parsed
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.reading import read_toml
from jmoe.engine.deployment.needs import weight_bytes
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.mesh import make_mesh
from jmoe.models import get_family
from jmoe.models.decoder import make_blueprint

RANKS = (1, 2, 4, 8)


class Published(NamedTuple):
    """A published quantised checkpoint.

    shape: file of its sizes in ``configs/model``.
    quantization: its ``quantization_config``, without the keys that are not read.
    """

    shape: str
    quantization: dict[str, Any]


MODELS = {
    "gpt-oss-20b": Published(
        "gpt-oss-20b",
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["self_attn", "mlp.router", "model.embed_tokens", "lm_head"],
        },
    ),
    "Qwen3-30B-A3B-FP8": Published(
        "qwen3-30b-a3b",
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.embed_tokens", "mlp.gate"],
        },
    ),
}


def measure() -> dict[str, Any]:
    """Returns the part of the results: bytes by model, form and number of ranks."""
    return {"ranks": list(RANKS), "bytes": {name: model_bytes(model) for name, model in MODELS.items()}}


def model_bytes(model: Published) -> dict[str, list[int]]:
    """Returns the bytes on a rank for each number of ranks, in bfloat16 and as published."""
    cfg = ModelConfig.from_dict(read_toml(shape_path(model.shape)))
    codings = {"bfloat16": UNQUANTISED, "published": published_codings(cfg, model.quantization)}
    found: dict[str, list[int]] = {name: [] for name in codings}
    for ranks in RANKS:
        settings, mesh = EngineSettings(expert_parallel_size=ranks), make_mesh(expert=ranks)
        for name, each in codings.items():
            found[name].append(weight_bytes(cfg, settings, mesh, each))
    return found


def published_codings(cfg: ModelConfig, quantization: dict[str, Any]) -> Codings:
    """Returns how the engine keeps each parameter of a checkpoint with that ``quantization_config``."""
    rules = parsed(quantization, Path("config.json"))
    cfg = replace(cfg, quant_method=quantization["quant_method"])
    params = []
    for stored in get_family(cfg.architecture).names(cfg):
        rule = rules.rule_of(stored.name)
        format = None if rule is None else rule.format
        params.append(
            StoredParam(
                stored.name, stored.path, stored.index, stored.expert, stored.form, stored.rows, format
            )
        )
    specs = abstract_decoder(make_blueprint(cfg, MoEConfig(), make_mesh()))[1]
    return codings_of(params, [path for path, spec in specs.items() if spec.products])
