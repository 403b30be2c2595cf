"""The Orbax side of a converted checkpoint. Import it only where it is needed: Orbax takes seconds to import.

Each layer is an Orbax checkpoint of its own (``params/layers.3``), and so are the parameters outside the
layers (``params/top``): Orbax holds all arrays of a checkpoint while it writes, so this bounds the memory by
one layer. Keys are the parameters' dotted paths; arrays are not compressed, since bfloat16 weights hardly
shrink.
"""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jmoe.blueprint import Blueprint, Codings
from jmoe.checkpoint.converted.manifest import MANIFEST, PARAMS, Manifest, read_manifest, verify_files
from jmoe.checkpoint.experts.renumber import permuted
from jmoe.checkpoint.experts.stacks import Stacks
from jmoe.checkpoint.params import (
    ParamSpec,
    abstract_decoder,
    by_path,
    fill,
    join_shards,
    joined,
    put_on_mesh,
)
from jmoe.config.model import ModelConfig
from jmoe.config.units import cause
from jmoe.models.decoder import Decoder
from jmoe.placement.placement import Placement

CHUNK = 32 << 20  # bytes; a device reads every chunk that its slice touches
READERS = ("orbax", "tensorstore", "array_serialization")  # modules whose coroutines read arrays


def group_of(path: str) -> str:
    """Returns the name of the Orbax checkpoint that holds a parameter."""
    parts = path.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else "top"


def grouped(paths: Mapping[str, object]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(group_of(path), []).append(path)
    return groups


def save_group(directory: Path, group: str, arrays: dict[str, np.ndarray]) -> None:
    # shard_axes splits an axis into single rows: right for experts, far too slow (12 s a GB) for an embedding
    options = {
        path: ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if array.ndim > 2 else ())
        for path, array in arrays.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        target = directory.resolve() / PARAMS / group
        checkpointer.save(target, args=ocp.args.PyTreeSave(arrays, save_args=options))


def restore_model(
    directory: Path,
    blueprint: Blueprint,
    placement: Placement | None,
    report: Callable[[int, int], None],
    *,
    own_dtypes: bool,
) -> Decoder:
    """Returns the model with each parameter read straight onto its devices, one layer at a time.

    It raises ValueError naming the file that is missing or changed, or the parameter that is not as
    ``config.json`` has it.

    placement: placement by which the experts are renumbered, on their devices; while a parameter is
        renumbered it takes its memory twice.
    report: function called with (bytes done, bytes in all) after each layer.
    own_dtypes: whether a router or vector that is stored in a wider dtype than the model's stays float32.
    """
    manifest, cfg, moe = read_manifest(directory), blueprint.cfg, blueprint.moe
    verify_files(directory, manifest)
    written = replace(blueprint, moe=moe.without_offload())
    model, specs = expected_model(directory, manifest, written, own_dtypes=own_dtypes)
    stacks = None
    if moe.offload is not None:
        model, wanted = abstract_decoder(blueprint)
        stacks = Stacks(wanted, cfg.moe_layers)
    values: dict[str, Any] = {}
    total, done = sum(s.nbytes for s in specs.values()), 0
    for group, paths in grouped(specs).items():
        written = [as_written(specs[path]) for path in paths]
        arrays = restore_group(directory, group, by_path(written))
        for spec, wanted in zip((specs[path] for path in paths), written, strict=True):
            done += spec.nbytes
            value = regrouped(joined(wanted, arrays), spec)
            if placement is not None:
                value = jax.tree.map(partial(_renumbered, spec.path, placement, cfg.moe_layers), value)
            if stacks is None or not stacks.take(spec.path, value):
                values[spec.path] = spec.in_memory(as_stored, value)
        report(done, total)
    if stacks is not None:
        for spec, buffers in stacks.items():
            values[spec.path] = spec.in_memory(put_on_mesh, buffers)
    return fill(model, values)


def as_written(spec: ParamSpec) -> Any:
    """Returns the arrays of a parameter as files have them, each with the sharding in which it is read. If
    ranks cut groups, every rank reads the scales of whole rows."""
    arrays = replace(spec, coding=spec.written).arrays
    if spec.written == spec.coding:
        return arrays

    def with_whole_rows(array: ParamSpec) -> ParamSpec:
        sharding = array.sharding
        assert isinstance(sharding, NamedSharding), "one device cuts no groups"
        return replace(array, sharding=sharding.update(spec=PartitionSpec(*sharding.spec[:-1], None)))

    return replace(arrays, **{name: with_whole_rows(getattr(arrays, name)) for name in _grouped(arrays)})


def regrouped(value: Any, spec: ParamSpec) -> Any:
    """Returns a parameter's value in the coding of ``spec``, whose groups are parts of the value's."""
    if spec.coding is None or value.coding == spec.coding:
        return value
    times = value.coding.group // spec.coding.group

    def cut(array: jax.Array, wanted: ParamSpec) -> jax.Array:
        run = jax.jit(lambda a: jnp.repeat(a, times, axis=-1), out_shardings=wanted.sharding)
        return run(array)

    arrays = {name: cut(getattr(value, name), getattr(spec.arrays, name)) for name in _grouped(value)}
    return replace(value, coding=spec.coding, **arrays)


def _grouped(weight: Any) -> list[str]:
    """Returns the names of the arrays that have one number for each group."""
    return ["scales"] if weight.lows is None else ["scales", "lows"]


def _renumbered(path: str, placement: Placement, moe_layers: Sequence[int], array: jax.Array) -> jax.Array:
    return permuted(path, array, placement, moe_layers)


def expected_model(
    directory: Path, manifest: Manifest, blueprint: Blueprint, *, own_dtypes: bool
) -> tuple[Decoder, dict[str, ParamSpec]]:
    """Returns the abstract model without expert offload, and its parameters as the manifest lists them."""
    cfg = blueprint.cfg
    check_count(directory, manifest, cfg)
    model, specs = abstract_decoder(replace(blueprint, codings=Codings(manifest.codings)))
    check_parameters(directory, manifest, by_path(map(as_written, specs.values())))
    kept = set(manifest.kept) if own_dtypes and cfg.dtype == manifest.dtype else set()
    return model, {p: s.in_float32() if p in kept and s.has_own_dtype else s for p, s in specs.items()}


def restore_group(directory: Path, group: str, specs: dict[str, ParamSpec]) -> dict[str, jax.Array]:
    """Returns the arrays of one group in the checkpoint's dtype, on their devices."""
    abstract = {p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding) for p, s in specs.items()}
    how = {
        path: ocp.ArrayRestoreArgs(dtype=s.dtype, sharding=s.sharding, global_shape=s.shape)
        for path, s in specs.items()
    }
    source = directory.resolve() / PARAMS / group
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            with quiet_reads():
                return checkpointer.restore(source, args=ocp.args.PyTreeRestore(abstract, restore_args=how))
        except Exception as error:  # there is no list of what a library raises for damaged files
            raise ValueError(f"{source}: cannot be restored: {cause(error)}") from error


@contextlib.contextmanager
def quiet_reads() -> Iterator[None]:
    """Silences the late errors of a failed read. When one of a group's reads fails, the others fail some
    moments later or find their event loop closed, and Python would print a traceback for each, after the one
    line that says what is wrong."""
    if not isinstance(sys.unraisablehook, _LateReads):
        sys.unraisablehook = _LateReads(sys.unraisablehook)
    policy = asyncio.get_event_loop_policy()
    make = policy.new_event_loop

    def make_quiet() -> asyncio.AbstractEventLoop:
        loop = make()
        loop.set_exception_handler(lambda *args: None)  # errors of reads that nobody waits for
        return loop

    policy.new_event_loop = make_quiet  # Orbax makes a loop for each call
    try:
        yield
    finally:
        policy.new_event_loop = make


@dataclass(frozen=True)
class _LateReads:
    report: Callable[[Any], object]

    def __call__(self, raised: Any) -> None:
        code = getattr(raised.object, "cr_code", None)  # of a coroutine
        reads = code is not None and any(reader in code.co_filename for reader in READERS)
        closed = isinstance(raised.exc_value, RuntimeError) and "loop is closed" in str(raised.exc_value)
        if not (reads or closed):
            self.report(raised)


def as_stored(array: jax.Array, spec: ParamSpec) -> jax.Array:
    """Returns ``array`` in the storage dtype and layout; on CPU its memory is reused if the layout is the
    checkpoint's."""
    if array.dtype == spec.storage and spec.packing is None:
        return array
    shards = array.addressable_shards
    return join_shards(spec, {s.device: np.asarray(s.data).view(spec.storage) for s in shards})


def check_count(directory: Path, manifest: Manifest, cfg: ModelConfig) -> None:
    """Rejects a config with another number of layers, before a model of so many layers is described."""
    layers = len([group for group in grouped(manifest.parameters) if group != "top"])
    if layers != cfg.num_hidden_layers:
        raise ValueError(
            f"{directory}: config.json has num_hidden_layers {cfg.num_hidden_layers}, {MANIFEST} has {layers}"
        )


def check_parameters(directory: Path, manifest: Manifest, specs: Mapping[str, ParamSpec]) -> None:
    where = directory / MANIFEST
    for path, spec in specs.items():
        if path not in manifest.parameters:
            raise ValueError(f"{where}: parameter {path!r} is missing")
        if manifest.parameters[path] != spec.shape:
            raise ValueError(
                f"{where}: parameter {path!r} must be {list(spec.shape)} by config.json, "
                f"it is {list(manifest.parameters[path])}"
            )
    for path in manifest.parameters:
        if path not in specs:
            raise ValueError(f"{where}: parameter {path!r} is not one of the model as config.json has it")
