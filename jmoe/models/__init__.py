"""Model families: one short file each, over the shared decoder."""

import difflib

from jmoe.config import ModelConfig
from jmoe.models import mixtral, olmoe, qwen3_moe
from jmoe.models.family import Family, HFConfig

FAMILIES = {f.architecture: f for f in (mixtral.FAMILY, qwen3_moe.FAMILY, olmoe.FAMILY)}


def get_family(architecture: str) -> Family:
    """The family of a Hugging Face class name; ValueError lists the supported ones and the nearest."""
    if architecture not in FAMILIES:
        near = difflib.get_close_matches(architecture, FAMILIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"architecture {architecture!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}; nearest: {near}"
        )
    return FAMILIES[architecture]


def model_config(hf: HFConfig) -> ModelConfig:
    """A ``config.json``'s contents as a ModelConfig; ValueError names what is missing or unsupported."""
    architectures = hf.get("architectures") or []
    if len(architectures) != 1:
        raise ValueError(f"config.json must name one architecture, got {architectures!r}")
    return get_family(architectures[0]).config(hf)


__all__ = ["FAMILIES", "Family", "get_family", "model_config"]
