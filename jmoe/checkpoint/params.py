"""A decoder's parameters as a table: shape, dtypes and sharding of each, before any memory is allocated."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jmoe_kernels import cpu
from jmoe_kernels.backends import DenseKernel
from jmoe_kernels.grouped_mlp import IMPLEMENTATIONS
from jmoe_kernels.quantised import LAYOUTS, Code, Coding, LayoutName, Role, code_storage

from jmoe.blueprint import Blueprint
from jmoe.config.reading import named
from jmoe.mesh import is_single, platform_of
from jmoe.models.decoder import Decoder
from jmoe.models.weights import StoredTensor
from jmoe.moe.expert_leaves import LEAVES, store_codings
from jmoe.param import ParamMaker, Products

Stored = TypeVar("Stored", bound=StoredTensor)
STACKED = {f"store.{leaf.store_name}": leaf.name for leaf in LEAVES}


@dataclass(frozen=True)
class Packing:
    """The way in which an array of a quantised parameter lies in memory.

    layout: layout of the parameter.
    role: what the array is to the parameter.
    code: kind of the parameter's codes.
    """

    layout: LayoutName
    role: Role
    code: Code

    def pack(self, array: np.ndarray, *, is_scratch: bool) -> np.ndarray:
        """Returns a device's part of the array, which is in a checkpoint's order, as it lies in memory;
        ``array`` itself, changed, if it is scratch and the layout allows it."""
        return LAYOUTS[self.layout].pack(array, self.role, self.code, is_scratch)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter, or one array of a quantised parameter.

    path: dotted path.
    shape: shape of the whole parameter.
    dtype: dtype in a checkpoint; of a quantised parameter, the dtype of its products.
    storage: dtype in memory, of the same width (uint16 for some bfloat16).
    sharding: how it is sharded over the devices.
    has_own_dtype: whether it stays float32 if the checkpoint stores it in a wider dtype than the model's.
    products: products that it is a factor of, those of experts or dense ones; None means that it cannot be
        quantised.
    coding: how its numbers are stored; None is not quantised.
    written: coding in a checkpoint: of ranks that cut its groups, ``coding`` has smaller ones.
    layout: layout of a quantised parameter in memory; the shape and the sharding are a checkpoint's.
    packing: how this array of a quantised parameter lies in memory; None is as in a checkpoint.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    storage: np.dtype
    sharding: Sharding
    has_own_dtype: bool = False
    products: Products | None = None
    coding: Coding | None = None
    written: Coding | None = None
    layout: LayoutName = "rows"
    packing: Packing | None = None

    def in_float32(self) -> "ParamSpec":
        """Returns the same parameter in float32."""
        return replace(self, dtype=np.dtype(np.float32), storage=np.dtype(np.float32))

    @property
    def arrays(self) -> Any:
        """The arrays that hold the parameter, each as a ParamSpec of its own: this one, or a ``Quantised``
        of them in a checkpoint's layout, whose paths end in ``.values``, ``.scales`` and ``.lows``."""
        coding, whole = self.coding, self.sharding
        if coding is None:
            return self
        shapes = coding.shapes(self.shape, self.dtype.name)
        if isinstance(whole, NamedSharding):
            spec = PartitionSpec(*whole.spec, *[None] * (len(self.shape) - len(whole.spec)))
            where = jax.tree.map(lambda axes: whole.update(spec=axes), shapes.split(spec))
        else:
            where = jax.tree.map(lambda _: whole, shapes)
        platform = next(iter(whole.device_set)).platform

        def one(role: Role, array: jax.ShapeDtypeStruct, sharding: Sharding) -> ParamSpec:
            storage = code_storage(coding.code, platform) if role == "values" else array.dtype
            packing = None if self.layout == "rows" else Packing(self.layout, role, coding.code)
            path = f"{self.path}.{role}"
            return ParamSpec(path, array.shape, array.dtype, storage, sharding, packing=packing)

        return jax.tree.map(one, shapes.roles, shapes, where)

    def in_memory(self, put: Callable[[Any, "ParamSpec"], Any], value: Any) -> Any:
        """Returns ``put(array, its ParamSpec)`` of every array of the parameter's value, as the parameter's
        value in memory."""
        kept = jax.tree.map(put, value, self.arrays)
        return kept if self.coding is None else replace(kept, layout=self.layout)

    @property
    def kept(self) -> jax.ShapeDtypeStruct:
        """The shape, dtype and sharding in memory of an array."""
        packing = self.packing
        if packing is None:
            return jax.ShapeDtypeStruct(self.shape, self.storage, sharding=self.sharding)
        layout, where = LAYOUTS[packing.layout], self.sharding
        if isinstance(where, NamedSharding):
            where = where.update(spec=layout.axes(where.spec, packing.role))
        shape, dtype = layout.kept(self.shape, self.storage, packing.role, packing.code)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    @property
    def nbytes(self) -> int:
        """Bytes in a checkpoint."""
        if self.coding is not None:
            return self.coding.nbytes(self.shape)
        return math.prod(self.shape) * self.dtype.itemsize


def by_path(parameters: Iterable[Any]) -> dict[str, ParamSpec]:
    """Returns the arrays of parameters, each as ``ParamSpec.arrays`` has them, by their paths."""
    return {array.path: array for arrays in parameters for array in jax.tree.leaves(arrays)}


def joined(arrays: Any, values: Mapping[str, Any]) -> Any:
    """Returns a parameter's value: its arrays, as ``ParamSpec.arrays`` has them, replaced by their values."""
    return jax.tree.map(lambda array: values[array.path], arrays)


def abstract_decoder(blueprint: Blueprint) -> tuple[Decoder, dict[str, ParamSpec]]:
    """Returns a Decoder of shapes without values, and its parameters by dotted path; raises ValueError for a
    coding that its parameter cannot have."""
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
        products = param.get_metadata("products", None)
        spec = ParamSpec(path, value.shape, dtype, value.dtype, sharding, has_own_dtype, products)
        specs[path] = _with_layout(with_coding(spec, coding_at(blueprint, path)), blueprint)
    if blueprint.codings:
        model = fill(model, {path: shapes_of(spec) for path, spec in specs.items()})
    return model, specs


def coding_at(blueprint: Blueprint, path: str) -> Coding | None:
    """Returns how the parameter at ``path`` is stored; a stack of all layers' experts as they all are."""
    if path in STACKED:
        return store_codings(blueprint.cfg, blueprint.codings).get(STACKED[path])
    return blueprint.codings.get(path)


def with_coding(spec: ParamSpec, coding: Coding | None) -> ParamSpec:
    """Returns the quantised parameter, with groups that no rank cuts."""
    if coding is None:
        return spec
    with named(f"parameter {spec.path!r}"):
        if spec.products is None:
            raise ValueError("it is used in more than products, so it cannot be quantised")
        inner = spec.shape[-1]
        local = spec.sharding.shard_shape(spec.shape)[-1]
        return replace(spec, coding=coding.split(inner, inner // local), written=coding)


def _with_layout(spec: ParamSpec, blueprint: Blueprint) -> ParamSpec:
    """Returns the parameter in the layout of the kernel that multiplies with it."""
    if spec.coding is None:
        return spec
    local = spec.sharding.shard_shape(spec.shape)
    if spec.products == "experts":
        layout = IMPLEMENTATIONS[blueprint.kernels.experts].layout_of(spec.coding)
    else:
        is_taken = dense_kernel(spec, blueprint) == "cpu" and cpu.limit(spec.coding) is None
        layout = "n16" if is_taken else "rows"
    return replace(spec, layout=layout) if LAYOUTS[layout].fits(spec.coding.code, local) else spec


def dense_kernel(spec: ParamSpec, blueprint: Blueprint) -> DenseKernel:
    """Returns the implementation of the products of a parameter that is not of experts, as the decoder has
    it."""
    is_head = in_layer(spec.path)[0] < 0
    return "xla" if is_head and not is_single(blueprint.mesh) else blueprint.kernels.dense


def shapes_of(spec: ParamSpec) -> Any:
    """Returns the parameter as shapes with dtypes in memory and shardings."""
    return spec.in_memory(lambda _, array: array.kept, spec.arrays)


def fill(model: Decoder, arrays: Mapping[str, Any]) -> Decoder:
    """Returns ``model`` with the value of every parameter replaced; raises KeyError if one is not in
    ``arrays``."""
    graph, state = nnx.split(model)
    flat = [(keys, param.replace(arrays[dotted(keys)])) for keys, param in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def dotted(keys: Iterable[Any]) -> str:
    return ".".join(map(str, keys))


def tensors_by_path(tensors: Iterable[Stored]) -> dict[str, list[Stored]]:
    """Returns the tensors of a checkpoint that fill each parameter, by the parameter's path; without the
    parameters that ``entry_numbers`` makes."""
    table: dict[str, list[Stored]] = {}
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
    if isinstance(spec.sharding, SingleDeviceSharding):
        kept = stored if spec.packing is None else spec.packing.pack(stored, is_scratch=True)
        buffer.flags.writeable = stored.flags.writeable = kept.flags.writeable = False
        return jax.device_put(kept, spec.sharding, may_alias=True)
    buffer.flags.writeable = stored.flags.writeable = False
    where = spec.sharding.addressable_devices_indices_map(spec.shape)
    return join_shards(spec, {device: stored[index] for device, index in where.items()})


def join_shards(spec: ParamSpec, parts: Mapping[Any, np.ndarray]) -> jax.Array:
    """Returns an array in memory.

    parts: each device's part of it, in a checkpoint's order and in the storage dtype.
    """
    kept, packing = spec.kept, spec.packing

    def put(own: np.ndarray, device: Any) -> jax.Array:
        packed = own if packing is None else packing.pack(own, is_scratch=False)
        there = SingleDeviceSharding(device, memory_kind=spec.sharding.memory_kind)
        return jax.device_put(packed, there, may_alias=True)

    shards = [put(own, device) for device, own in parts.items()]
    if isinstance(spec.sharding, SingleDeviceSharding):
        return shards[0]
    return jax.make_array_from_single_device_arrays(kept.shape, kept.sharding, shards)
