"""The base class of the lossy techniques of a layer: a stage after the router."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jax import Array
from jaxtyping import Float

from jmoe.blueprint import Blueprint
from jmoe.config.techniques import LossyConfig, Phase
from jmoe.moe.types import Changes, Knobs, Routing, TokenFlags


@dataclass(frozen=True)
class Stage(ABC):
    """A lossy technique within one layer: it takes a routing and returns a new one.

    table: configuration of the technique.
    blueprint: model, mesh and kernels for which the layer is built.
    """

    table: LossyConfig
    blueprint: Blueprint

    @abstractmethod
    def acts_in(self, phase: Phase) -> bool:
        """Returns whether the stage does anything in steps of that phase."""

    @abstractmethod
    def __call__(
        self, routing: Routing, tokens: TokenFlags, knobs: Knobs, resident_E: Array | None
    ) -> tuple[Routing, Changes]:
        """Returns the new routing and what the stage changed.

        resident_E: which experts are on a device; None if all are.
        """

    def route(
        self, logits_TE: Float[Array, "T E"], tokens: TokenFlags
    ) -> tuple[Routing, Routing, Changes] | None:
        """Runs the router and this stage in one kernel; returns None if there is no such kernel for these
        tokens.

        It returns the router's own choice, the stage's routing and what the stage changed. Only the first
        stage of a step may do this.
        """
        return None
