"""A decoder's parameters as a table: shape, dtypes and sharding of each, before any memory is allocated."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jmoe.blueprint import Blueprint
from jmoe.mesh import is_single, platform_of
from jmoe.models.decoder import Decoder
from jmoe.models.weights import StoredTensor
from jmoe.param import ParamMaker


@dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    path: dotted path.
    shape: shape of the whole parameter.
    dtype: dtype in a checkpoint.
    storage: dtype in memory, of the same width (uint16 for some bfloat16).
    sharding: how it is sharded over the devices.
    has_own_dtype: whether it stays float32 if the checkpoint stores it in a wider dtype than the model's.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    storage: np.dtype
    sharding: Sharding
    has_own_dtype: bool = False

    def in_float32(self) -> "ParamSpec":
        """Returns the same parameter in float32."""
        return replace(self, dtype=np.dtype(np.float32), storage=np.dtype(np.float32))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def abstract_decoder(blueprint: Blueprint) -> tuple[Decoder, dict[str, ParamSpec]]:
    """Returns a Decoder of shapes without values, and its parameters by dotted path."""
    mesh = blueprint.mesh
    make_dtype, where = jnp.dtype(blueprint.cfg.dtype), platform_of(mesh)
    make = ParamMaker(make_dtype, nnx.Rngs(0), std=0.0, platform=where)
    model = nnx.eval_shape(lambda: Decoder(blueprint, make))
    specs = {}
    for keys, param in nnx.to_flat_state(nnx.state(model)):
        path, value = dotted(keys), param.get_value()
        memory = param.get_metadata("memory", None)
        if is_single(mesh):
            sharding = SingleDeviceSharding(mesh.devices.item(), memory_kind=memory)
        else:
            axes = PartitionSpec(*param.get_metadata("axes"))
            sharding = NamedSharding(mesh, axes, memory_kind=memory)
        # a parameter may be float32 in a bfloat16 model
        dtype = np.dtype(ml_dtypes.bfloat16) if value.dtype == np.uint16 else value.dtype
        has_own_dtype = value.ndim == 1 or bool(param.get_metadata("has_own_dtype", False))
        specs[path] = ParamSpec(path, value.shape, dtype, value.dtype, sharding, has_own_dtype)
    return model, specs


def fill(model: Decoder, arrays: Mapping[str, jax.Array]) -> Decoder:
    """Returns ``model`` with the value of every parameter replaced; raises KeyError if one is not in
    ``arrays``."""
    graph, state = nnx.split(model)
    flat = [(keys, param.replace(arrays[dotted(keys)])) for keys, param in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def dotted(keys: Iterable[Any]) -> str:
    return ".".join(map(str, keys))


def tensors_by_path(tensors: Iterable[StoredTensor]) -> dict[str, list[StoredTensor]]:
    """Returns the tensors of a checkpoint that fill each parameter, by the parameter's path; without the
    parameters that ``entry_numbers`` makes."""
    table: dict[str, list[StoredTensor]] = {}
    for stored in tensors:
        table.setdefault(stored.path, []).append(stored)
    return table


def entry_numbers(spec: ParamSpec) -> np.ndarray:
    """Returns a parameter that published checkpoints do not have: the numbers of its entries."""
    assert spec.dtype == np.int32, f"{spec.path} has no tensor"
    return np.arange(spec.shape[0], dtype=np.int32)


def in_layer(path: str) -> tuple[int, str]:
    """Returns (3, "moe.gate_ED") for "layers.3.moe.gate_ED"; -1 and the path if it is in no layer."""
    top, _, rest = path.partition(".")
    if top != "layers":
        return -1, path
    layer, _, name = rest.partition(".")
    return int(layer), name


def put_on_mesh(buffer: np.ndarray, spec: ParamSpec) -> jax.Array:
    """Puts ``buffer`` (in the checkpoint's dtype) on the mesh, in the storage dtype.

    On one CPU device the array is the buffer itself if that is 64-byte aligned, so the caller must not write
    to it any more; it is made read-only.
    """
    stored = buffer.view(spec.storage)
    buffer.flags.writeable = stored.flags.writeable = False
    if isinstance(spec.sharding, SingleDeviceSharding):
        return jax.device_put(stored, spec.sharding, may_alias=True)
    return jax.make_array_from_callback(spec.shape, spec.sharding, lambda index: stored[index])
