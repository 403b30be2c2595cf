"""Loading a model whose experts are offloaded: the checkpoint's tensors go into stacks of all layers.

``layers.3.moe.experts.down_EDF[e]`` of a checkpoint is ``store.down_LEDF[n, e]`` in memory, if layer 3 is the
n-th of ``moe_layers``, the numbers of the layers that have experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jmoe.checkpoint.checkpoint import aligned_empty
from jmoe.checkpoint.params import ParamSpec, in_layer
from jmoe.checkpoint.quantised.formats import StoredParam
from jmoe.moe.expert_leaves import LEAVES

STACKS = {f"moe.experts.{leaf.name}": f"store.{leaf.store_name}" for leaf in LEAVES}


def into_stacks(
    table: Mapping[str, list[StoredParam]], moe_layers: Sequence[int]
) -> dict[str, list[StoredParam]]:
    """Returns the tensors that fill each parameter; an expert's tensors fill its slice of the stacks."""
    moved: dict[str, list[StoredParam]] = {}
    for path, parts in table.items():
        layer, name = in_layer(path)
        if name in STACKS:
            stack, row = STACKS[name], moe_layers.index(layer)
            indexed = [replace(p, path=stack, index=(row, *p.index)) for p in parts]
            moved.setdefault(stack, []).extend(indexed)
        else:
            moved[path] = parts
    return moved


class Stacks:
    """The stacks as buffers that are filled layer by layer."""

    def __init__(self, specs: Mapping[str, ParamSpec], moe_layers: Sequence[int]):
        """Makes the buffers, which are not filled yet.

        specs: parameters of the model with offloaded experts.
        """
        self._moe_layers = moe_layers
        self._specs = {path: specs[path] for path in STACKS.values() if path in specs}
        self._buffers = {
            path: jax.tree.map(lambda array: aligned_empty(array.shape, array.dtype), spec.arrays)
            for path, spec in self._specs.items()
        }

    def take(self, path: str, value: Any) -> bool:
        """Copies a parameter's value into its stack if it is a layer's experts; returns whether it is.

        With several processes only the parts on this process's devices are filled: the others are never read.
        """
        layer, name = in_layer(path)
        if name not in STACKS:
            return False

        def copy(buffer: np.ndarray, array: jax.Array) -> None:
            row = buffer[self._moe_layers.index(layer)]
            for shard in array.addressable_shards:
                row[shard.index] = np.asarray(shard.data).view(buffer.dtype)

        jax.tree.map(copy, self._buffers[STACKS[name]], value)
        return True

    def items(self) -> Iterator[tuple[ParamSpec, Any]]:
        """Yields each stack with its buffer, or the buffers of a quantised one."""
        for path, buffer in self._buffers.items():
            yield self._specs[path], buffer
