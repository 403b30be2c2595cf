"""Checkpoints of a model whose experts are offloaded: the same tensors in one stack of all layers.

``layers.3.moe.experts.down_EDF[e]`` of a checkpoint is ``store.down_LEDF[3, e]`` in memory.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from jmoe.checkpoint.hf_reader import aligned_empty
from jmoe.checkpoint.params import ParamSpec, Source, in_layer
from jmoe.checkpoint.renumber import EXPERTS

STACKS = dict(zip(EXPERTS, ("store.gate_up_LE2FD", "store.down_LEDF"), strict=True))


def into_stacks(table: Mapping[str, list[Source]]) -> dict[str, list[Source]]:
    """The sources of each parameter, an expert's tensors filling its slice of the stacks."""
    moved: dict[str, list[Source]] = {}
    for path, parts in table.items():
        layer, name = in_layer(path)
        if name in STACKS:
            indexed = [Source(part.name, (layer, *part.index)) for part in parts]
            moved.setdefault(STACKS[name], []).extend(indexed)
        else:
            moved[path] = parts
    return moved


class Stacks:
    """The stacks as buffers that layers are put into one by one."""

    def __init__(self, specs: Mapping[str, ParamSpec]):
        """specs: of the model with offloaded experts."""
        self._specs = {path: specs[path] for path in STACKS.values()}
        self._buffers = {path: aligned_empty(s.shape, s.dtype) for path, s in self._specs.items()}

    def take(self, path: str, array: object) -> bool:
        """Whether ``array`` is a layer's experts, copied."""
        layer, name = in_layer(path)
        if name not in STACKS:
            return False
        buffer = self._buffers[STACKS[name]]
        buffer[layer] = np.asarray(array).view(buffer.dtype)
        return True

    def finished(self) -> Iterator[tuple[ParamSpec, np.ndarray]]:
        for path, buffer in self._buffers.items():
            yield self._specs[path], buffer
