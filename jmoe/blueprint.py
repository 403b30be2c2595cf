"""The facts that a model's modules are made from, decided once before any of them."""

from dataclasses import dataclass

from jax.sharding import Mesh
from jmoe_kernels.choice import Kernels

from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.mesh import Split


@dataclass(frozen=True)
class Blueprint:
    """The plan by which a model is built on a mesh. Equal blueprints make equal modules.

    cfg: shape of the model.
    moe: settings of its MoE layers.
    split: mesh, and how attention is split over it.
    kernels: kernels of one rank, each with the reason for its choice.
    """

    cfg: ModelConfig
    moe: MoEConfig
    split: Split
    kernels: Kernels

    @property
    def mesh(self) -> Mesh:
        return self.split.mesh
