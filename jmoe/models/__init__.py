"""Model families: one short file each, over the shared decoder.

``decoder`` embeds the tokens of a step (decode tokens and prompt tokens), runs the layers and normalises.
``layer`` is one layer: attention, then a MoE layer, perhaps with a shared expert, or a dense MLP.
``step_techniques`` makes what each layer takes from the techniques, its ``journey``, and collects what it
did. ``predictor_views`` is what predictors of offloaded experts see of a step. A family says how its
``config.json`` is read (``family``, ``fields``) and what its tensors are called (``names``, ``weights``).
"""

import difflib
from collections.abc import Mapping
from typing import Any

from jmoe.config.model import ModelConfig
from jmoe.config.reading import shown
from jmoe.models import (
    deepseek,
    dots1,
    glm4_moe,
    gpt_oss,
    granitemoe,
    llama4,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
)
from jmoe.models.family import Family
from jmoe.models.fields import HFConfig
from jmoe.nn.kinds import kinds_of

FAMILIES = {
    family.architecture: family
    for family in (
        mixtral.FAMILY, qwen2_moe.FAMILY, qwen3_moe.FAMILY, olmoe.FAMILY, deepseek.V2, deepseek.V3,
        dots1.FAMILY, glm4_moe.FAMILY, gpt_oss.FAMILY, granitemoe.FAMILY, llama4.FAMILY,
        llama4.WITH_IMAGES, phimoe.FAMILY, phimoe.PUBLISHED,
    )
}  # fmt: skip


def get_family(architecture: str) -> Family:
    """Returns the family of a Hugging Face class name; a ValueError lists the supported ones and the
    nearest."""
    if architecture not in FAMILIES:
        near = difflib.get_close_matches(architecture[:100], FAMILIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"architecture {shown(architecture)} is not supported; "
            f"supported: {', '.join(FAMILIES)}; nearest: {near}"
        )
    return FAMILIES[architecture]


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Returns a ``config.json``'s contents as a ModelConfig; a ValueError names what is missing or
    unsupported."""
    hf = HFConfig(values)
    architectures = hf.get("architectures") or ()
    if len(architectures) != 1:
        raise ValueError(f"config.json must name one architecture, got {shown(list(architectures))}")
    family = get_family(architectures[0])
    cfg = family.config(hf)
    for kind in kinds_of(cfg):
        cfg.rope.check(kind.rotary_dim(cfg))
    return cfg


__all__ = ["FAMILIES", "Family", "get_family", "model_config"]
