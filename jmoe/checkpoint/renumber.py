"""Experts renumbered by a placement while a model loads: gate rows and expert weights move together.

Exact: a token's experts have other ids and the same weights. In each layer, slot p gets what the checkpoint
calls expert ``experts_LP[layer, p]``.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.checkpoint.identity import model_identity
from jmoe.checkpoint.params import Source, in_layer
from jmoe.config import ModelConfig
from jmoe.models.decoder import Decoder
from jmoe.moe.placement import Placement

GATE = "moe.gate_ED"
EXPERTS = ("moe.experts.gate_up_E2FD", "moe.experts.down_EDF")


def check_fits(placement: Placement, cfg: ModelConfig) -> None:
    """Raises ValueError for a placement of another shape or with replicas, before anything is read."""
    placement.check(
        model=placement.model, layers=cfg.num_hidden_layers, experts=cfg.num_experts, ranks=placement.ranks
    )
    if not placement.permutes:
        raise ValueError("the placement has replicas of experts; a model loads with one slot an expert")


def check_model(placement: Placement, model: Decoder) -> None:
    """Raises ValueError unless ``placement``, by which ``model`` was renumbered, was made for it."""
    cfg = model.cfg
    placement.check(
        model=model_identity(model, placement), layers=cfg.num_hidden_layers, experts=cfg.num_experts,
        ranks=placement.ranks,
    )  # fmt: skip


def into_slots(table: Mapping[str, list[Source]], placement: Placement) -> dict[str, list[Source]]:
    """The sources of each parameter, an expert's tensors filling the slice of its slot."""
    moved = {}
    for path, parts in table.items():
        layer, name = in_layer(path)
        if name in EXPERTS:
            slot_E = np.argsort(placement.experts_LP[layer])
            parts = [Source(part.name, (int(slot_E[part.index[0]]), *part.index[1:])) for part in parts]
        moved[path] = parts
    return moved


def permute_gate(path: str, buffer: np.ndarray, placement: Placement) -> None:
    """Moves the rows in place where ``path`` is a gate."""
    layer, name = in_layer(path)
    if name == GATE:
        buffer[...] = buffer[placement.experts_LP[layer]]


def permuted(path: str, array: jax.Array, placement: Placement) -> jax.Array:
    """A parameter in the checkpoint's order as it is to lie on the same devices."""
    layer, name = in_layer(path)
    if name not in (GATE, *EXPERTS):
        return array
    take = jax.jit(lambda a, slots_P: jnp.take(a, slots_P, axis=0), out_shardings=array.sharding)
    return take(array, placement.experts_LP[layer])
