"""The parameters of a routed expert, each declared once: its name, its shape, its mesh axes, its bytes.

Modules, sharding, checkpoints, the expert cache and the statistics iterate over ``LEAVES``.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jmoe_kernels.grouped_mlp import ExpertWeights

from jmoe.config.model import ModelConfig
from jmoe.mesh import TENSOR
from jmoe.param import Axes


@dataclass(frozen=True)
class ExpertLeaf:
    """One parameter of an expert.

    stem: its name without axes.
    dims: letters of its dimensions within one expert: 2 (gate and up), F (inner), D (model).
    is_bias: whether only models with ``expert_bias`` have it.
    """

    stem: str
    dims: str
    is_bias: bool = False

    @property
    def name(self) -> str:
        """Its name in ``ExpertWeights``, stacked over the experts of a layer."""
        return f"{self.stem}_E{self.dims}"

    @property
    def store_name(self) -> str:
        """Its name in the host's store, stacked over layers and experts."""
        return f"{self.stem}_LE{self.dims}"

    @property
    def axes(self) -> Axes:
        """The mesh axis of each dimension: only the inner dimension is split."""
        return tuple(TENSOR if letter == "F" else None for letter in self.dims)

    def shape(self, cfg: ModelConfig, num_parts: int = 1) -> tuple[int, ...]:
        """Returns its shape in one expert, or in one of ``num_parts`` devices that split the inner
        dimension."""
        sizes = {"2": 2, "F": cfg.moe_intermediate_size // num_parts, "D": cfg.hidden_size}
        return tuple(sizes[letter] for letter in self.dims)


LEAVES = (
    ExpertLeaf("gate_up", "2FD"),
    ExpertLeaf("down", "DF"),
    ExpertLeaf("gate_up_bias", "2F", is_bias=True),
    ExpertLeaf("down_bias", "D", is_bias=True),
)


def leaves_of(cfg: ModelConfig) -> tuple[ExpertLeaf, ...]:
    """Returns the leaves that the model's experts have."""
    return tuple(leaf for leaf in LEAVES if cfg.expert_bias or not leaf.is_bias)


def expert_bytes(cfg: ModelConfig, num_parts: int = 1) -> int:
    """Returns the bytes of one routed expert, or of a device's part of it if it is split over ``num_parts``
    devices."""
    numbers = sum(math.prod(leaf.shape(cfg, num_parts)) for leaf in leaves_of(cfg))
    return numbers * jnp.dtype(cfg.dtype).itemsize


def weight_specs(weights: ExpertWeights, *front: str | tuple[str, ...] | None) -> ExpertWeights:
    """Returns how stacks of experts are split. The result is None for a weight that is None in ``weights``.

    front: mesh axes of the dimensions before an expert's own dimensions.
    """
    specs = {leaf.name: PartitionSpec(*front, *leaf.axes) for leaf in LEAVES}
    present = {name: spec if getattr(weights, name) is not None else None for name, spec in specs.items()}
    return ExpertWeights(**present)  # pyright: ignore[reportArgumentType]
