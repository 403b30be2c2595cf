"""The facts that a model's modules are made from, decided once before any of them."""

from collections import Counter
from dataclasses import dataclass, field

from jax.sharding import Mesh
from jmoe_kernels.choice import Kernels
from jmoe_kernels.quantised import Coding

from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.mesh import Split


class Codings(dict[str, Coding]):
    """The codings of quantised parameters, by the paths that these have if no experts are offloaded. It is
    not changed after it is made."""

    def __str__(self) -> str:
        counts = Counter((str(coding), ".experts." in path) for path, coding in self.items())
        kinds = {True: "of experts", False: "dense"}
        parts = (f"{count} {kinds[experts]} in {how}" for (how, experts), count in counts.items())
        return "; ".join(sorted(parts))

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(frozenset(self.items()))


UNQUANTISED = Codings()


@dataclass(frozen=True)
class Blueprint:
    """The plan by which a model is built on a mesh. Equal blueprints make equal modules.

    cfg: shape of the model.
    moe: settings of its MoE layers.
    split: mesh, and how attention is split over it.
    kernels: kernels of one rank, each with the reason for its choice.
    codings: how the quantised parameters are stored.
    """

    cfg: ModelConfig
    moe: MoEConfig
    split: Split
    kernels: Kernels
    codings: Codings = field(default_factory=lambda: UNQUANTISED)

    @property
    def mesh(self) -> Mesh:
        return self.split.mesh
