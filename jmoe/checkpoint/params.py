"""A decoder's parameters as a table: shape, dtypes and sharding of each, before any memory is allocated."""

import math
from collections.abc import Iterable, Mapping
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
from jmoe_kernels.interleave import Layout, Part, interleave, interleaved
from jmoe_kernels.quantised import Coding, code_storage

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
    layout: order of a quantised parameter's numbers in memory.
    part: what this array of a quantised parameter is to ``interleave``; None leaves it as it is.
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
    layout: Layout = "rows"
    part: Part | None = None

    def in_float32(self) -> "ParamSpec":
        """Returns the same parameter in float32."""
        return replace(self, dtype=np.dtype(np.float32), storage=np.dtype(np.float32))

    @property
    def arrays(self) -> Any:
        """The arrays that hold the parameter, each as a ParamSpec of its own: this one, or a ``Quantised``
        of them, whose paths end in ``.values``, ``.scales`` and ``.lows``."""
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

        def one(name: str, array: jax.ShapeDtypeStruct, sharding: Sharding, part: Part) -> ParamSpec:
            storage = code_storage(coding.code, platform) if name == "values" else array.dtype
            spec = ParamSpec(f"{self.path}.{name}", array.shape, array.dtype, storage, sharding)
            return replace(spec, part=part) if self.layout == "n16" else spec

        names = replace(shapes, values="values", scales="scales", lows=shapes.lows and "lows")
        parts = replace(coding.parts, dtype=shapes.dtype)
        return replace(jax.tree.map(one, names, shapes, where, parts), layout=self.layout)

    @property
    def nbytes(self) -> int:
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
    kernel = blueprint.kernels.experts if spec.products == "experts" else dense_kernel(spec, blueprint)
    local = spec.sharding.shard_shape(spec.shape)
    fits = kernel == "cpu" and cpu.limit(spec.coding) is None and spec.coding.can_interleave(local)
    return replace(spec, layout="n16") if fits else spec


def dense_kernel(spec: ParamSpec, blueprint: Blueprint) -> DenseKernel:
    """Returns the implementation of the products of a parameter that is not of experts, as the decoder has
    it."""
    is_head = in_layer(spec.path)[0] < 0
    return "xla" if is_head and not is_single(blueprint.mesh) else blueprint.kernels.dense


def shapes_of(spec: ParamSpec) -> Any:
    """Returns the parameter as shapes with dtypes in memory and shardings."""
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.storage, sharding=array.sharding), spec.arrays
    )


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
    if spec.part is not None and isinstance(spec.sharding, SingleDeviceSharding):
        interleave(stored, spec.part)
    buffer.flags.writeable = stored.flags.writeable = False
    if isinstance(spec.sharding, SingleDeviceSharding):
        return jax.device_put(stored, spec.sharding, may_alias=True)
    return jax.make_array_from_callback(spec.shape, spec.sharding, lambda index: _shard(stored[index], spec))


def _shard(own: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """Returns a device's part of an array in the layout of its parameter."""
    return own if spec.part is None else interleaved(own, spec.part)
