"""Reads the sizes of a layer from the shapes of published models in ``configs/model``."""

import tomllib
from pathlib import Path
from typing import NamedTuple

CONFIGS = Path(__file__).parents[2] / "configs/model"


class LayerSizes(NamedTuple):
    """The sizes of a layer of experts.

    experts: number of experts.
    inner: width inside an expert.
    model: width of the model.
    routed: number of experts of a token.
    """

    experts: int
    inner: int
    model: int
    routed: int

    @property
    def dims(self) -> tuple[int, int, int]:
        """Returns the sizes of the experts' weights."""
        return self.experts, self.inner, self.model


def shape_path(name: str) -> Path:
    """Returns the file of the shape ``name``."""
    return CONFIGS / f"{name}.toml"


def layer_sizes(name: str) -> LayerSizes:
    """Returns the sizes of the MoE layers of the shape ``name``."""
    shape = tomllib.loads(shape_path(name).read_text(encoding="utf-8"))
    fields = "num_experts", "moe_intermediate_size", "hidden_size", "num_experts_per_tok"
    return LayerSizes(*(shape[field] for field in fields))
