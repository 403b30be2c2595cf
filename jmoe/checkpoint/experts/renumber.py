"""Experts renumbered by a placement while a model loads: gate rows and expert weights move together.

This is exact: a token's experts have other ids and the same weights. In the n-th layer that has experts, slot
p gets the checkpoint's expert ``experts_LP[n, p]``. ``moe_layers`` are the numbers of the layers that have
experts, in order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.checkpoint.identity import model_identity
from jmoe.checkpoint.params import in_layer
from jmoe.checkpoint.quantised.formats import StoredParam
from jmoe.config.model import ModelConfig
from jmoe.models.decoder import Decoder
from jmoe.moe.expert_leaves import LEAVES
from jmoe.placement.placement import Placement

# parameters that have one row for each expert: of a layer's router, and of its experts
GATES = tuple(f"moe.router.{name}" for name in ("gate_ED", "bias_E", "correction_E", "expert_E"))
EXPERTS = tuple(f"moe.experts.{leaf.name}" for leaf in LEAVES)


def check_fits(placement: Placement, cfg: ModelConfig) -> None:
    """Raises ValueError for a placement of another shape or with replicas, before anything is read."""
    placement.check(
        model=placement.model, layers=len(cfg.moe_layers), experts=cfg.num_experts, ranks=placement.ranks
    )
    if not placement.permutes:
        raise ValueError("the placement has replicas of experts; a model loads with one slot an expert")


def check_model(placement: Placement, model: Decoder) -> None:
    """Raises ValueError unless ``placement``, by which ``model`` was renumbered, was made for it."""
    cfg = model.cfg
    placement.check(
        model=model_identity(model, placement), layers=len(cfg.moe_layers), experts=cfg.num_experts,
        ranks=placement.ranks,
    )  # fmt: skip


def into_slots(
    table: Mapping[str, list[StoredParam]], placement: Placement, moe_layers: Sequence[int]
) -> dict[str, list[StoredParam]]:
    """Returns the tensors that fill each parameter; an expert's tensors fill the slice of its slot."""
    moved = {}
    for path, parts in table.items():
        layer, name = in_layer(path)
        if name in EXPERTS:
            slot_E = np.argsort(placement.experts_LP[moe_layers.index(layer)])
            parts = [replace(p, index=(int(slot_E[p.index[0]]), *p.index[1:])) for p in parts]
        moved[path] = parts
    return moved


def permute_gate(path: str, buffer: Any, placement: Placement, moe_layers: Sequence[int]) -> None:
    """Moves the rows in place if ``path`` is a router's parameter."""
    layer, name = in_layer(path)
    if name in GATES:
        buffer[...] = buffer[placement.experts_LP[moe_layers.index(layer)]]


def permuted(path: str, array: jax.Array, placement: Placement, moe_layers: Sequence[int]) -> jax.Array:
    """Renumbers an array of a parameter that is in the checkpoint's order; the result is on the same devices.

    path: path of the parameter.
    """
    layer, name = in_layer(path)
    if name not in (*GATES, *EXPERTS):
        return array
    take = jax.jit(lambda a, slots_P: jnp.take(a, slots_P, axis=0), out_shardings=array.sharding)
    return take(array, placement.experts_LP[moe_layers.index(layer)])
