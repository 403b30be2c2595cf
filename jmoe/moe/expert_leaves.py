"""The parameters of a routed expert, each declared once: its name, its shape, its mesh axes, its bytes.

Modules, sharding, checkpoints, the expert cache and the statistics iterate over ``LEAVES``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jmoe_kernels.grouped_mlp import IMPLEMENTATIONS, ExpertCodings, ExpertKernel, ExpertWeights
from jmoe_kernels.quantised import Coding, LayoutName, Quantised, coding_of

from jmoe.blueprint import Codings
from jmoe.config.model import ModelConfig
from jmoe.mesh import TENSOR
from jmoe.param import Axes, split

LeafCodings = Mapping[str, Coding]  # how leaves are stored, by their names; the others are not quantised
UNCODED: LeafCodings = MappingProxyType({})
LeafLayouts = Mapping[str, LayoutName]  # how quantised leaves lie in memory; the others are in rows
IN_ROWS: LeafLayouts = MappingProxyType({})


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

    def inner_parts(self, num_parts: int) -> int:
        """Returns the number of devices that share a row, if ``num_parts`` split the inner dimension."""
        return num_parts if self.dims[-1] == "F" else 1

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


def expert_bytes(
    cfg: ModelConfig, codings: LeafCodings = UNCODED, num_parts: int = 1, layouts: LeafLayouts = IN_ROWS
) -> int:
    """Returns the bytes of one routed expert, or of a device's part of it if it is split over ``num_parts``
    devices.

    codings, layouts: how its leaves are stored.
    """

    def one(leaf: ExpertLeaf) -> int:
        name = leaf.name
        return _leaf_bytes(leaf, cfg, codings.get(name), num_parts, layouts.get(name, "rows"))

    return sum(map(one, leaves_of(cfg)))


def _leaf_bytes(
    leaf: ExpertLeaf, cfg: ModelConfig, coding: Coding | None, num_parts: int, layout: LayoutName
) -> int:
    shape = leaf.shape(cfg, num_parts)
    if coding is None:
        return math.prod(shape) * jnp.dtype(cfg.dtype).itemsize
    return coding.split(leaf.shape(cfg)[-1], leaf.inner_parts(num_parts)).nbytes(shape, layout)


def codings_of(weights: ExpertWeights) -> LeafCodings:
    """Returns how the leaves of stacks of experts are stored."""
    found = {leaf.name: coding_of(getattr(weights, leaf.name)) for leaf in LEAVES}
    return {name: coding for name, coding in found.items() if coding is not None}


def layouts_for(kernel: ExpertKernel, codings: LeafCodings) -> LeafLayouts:
    """Returns the layouts in which a kernel wants leaves."""
    return {name: IMPLEMENTATIONS[kernel].layout_of(coding) for name, coding in codings.items()}


def layouts_of(weights: ExpertWeights) -> LeafLayouts:
    """Returns the layouts of the quantised leaves of stacks of experts."""
    leaves = {leaf.name: getattr(weights, leaf.name) for leaf in LEAVES}
    return {name: leaf.layout for name, leaf in leaves.items() if isinstance(leaf, Quantised)}


def layer_codings(codings: Codings, layer: int) -> LeafCodings:
    """Returns how the leaves of a layer's experts are stored."""
    paths = {leaf.name: f"layers.{layer}.moe.experts.{leaf.name}" for leaf in LEAVES}
    return {name: codings[path] for name, path in paths.items() if path in codings}


def store_codings(cfg: ModelConfig, codings: Codings) -> LeafCodings:
    """Returns how the leaves of all layers' experts are stored; raises ValueError if layers differ, because
    the experts of all layers share one pool."""
    found = [layer_codings(codings, layer) for layer in cfg.moe_layers]
    for layer, own in zip(cfg.moe_layers, found, strict=True):
        if own != found[0]:
            shown = [", ".join(f"{name} {coding}" for name, coding in c.items()) for c in (found[0], own)]
            raise ValueError(
                f"moe.offload: experts of all layers share one pool, so they must be stored alike; layer "
                f"{cfg.moe_layers[0]} has {shown[0] or 'plain numbers'}, layer {layer} "
                f"{shown[1] or 'plain numbers'}"
            )
    return found[0]


def local_codings(cfg: ModelConfig, codings: Codings, mesh: Mesh) -> tuple[ExpertCodings, ...]:
    """Returns how the layers' experts are stored on a rank, each way once; empty if none is quantised."""
    layers = [layer_codings(codings, layer) for layer in cfg.moe_layers]
    if not any(layers):
        return ()
    gate_up, down = LEAVES[:2]
    parts = mesh.shape[TENSOR]

    def local(leaf: ExpertLeaf, own: LeafCodings) -> Coding | None:
        coding = own.get(leaf.name)
        return coding and coding.split(leaf.shape(cfg)[-1], leaf.inner_parts(parts))

    return tuple(dict.fromkeys((local(gate_up, own), local(down, own)) for own in layers))


def weight_specs(weights: ExpertWeights, *front: str | tuple[str, ...] | None) -> ExpertWeights:
    """Returns how stacks of experts are split. The result is None for a weight that is None in ``weights``.

    front: mesh axes of the dimensions before an expert's own dimensions.
    """
    specs = {leaf.name: PartitionSpec(*front, *leaf.axes) for leaf in LEAVES}
    present = {
        name: None if (weight := getattr(weights, name)) is None else split(weight, spec)
        for name, spec in specs.items()
    }
    return ExpertWeights(**present)  # pyright: ignore[reportArgumentType]
