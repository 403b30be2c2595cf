"""``load_model``: loads a directory of weights, Hugging Face's or a converted one, as a Decoder on a mesh."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from jmoe.blueprint import Blueprint, Codings
from jmoe.checkpoint.checkpoint import Checkpoint, aligned_empty
from jmoe.checkpoint.converted.manifest import is_converted, read_manifest
from jmoe.checkpoint.experts.renumber import check_fits, check_model, into_slots, permute_gate
from jmoe.checkpoint.experts.stacks import into_stacks
from jmoe.checkpoint.facts import is_wider, listed, own_dtype, with_own_head
from jmoe.checkpoint.params import (
    ParamSpec,
    abstract_decoder,
    entry_numbers,
    fill,
    put_on_mesh,
    tensors_by_path,
)
from jmoe.checkpoint.quantised.codings import Quantize, read_codings
from jmoe.checkpoint.quantised.formats import StoredParam
from jmoe.checkpoint.slices import Buffer, check_shapes, read_slice
from jmoe.checkpoint.source import ModelFiles, Source, is_gguf, source_of
from jmoe.checkpoint.workers import Workers
from jmoe.config.choices import DTypeChoice
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.reading import named
from jmoe.mesh import make_mesh
from jmoe.models import model_config
from jmoe.models.decoder import Decoder, make_blueprint
from jmoe.placement.placement import Placement

LoadProgress = Callable[[int, int], None]
LONGEST = 2**31 - 1  # tokens of a context: positions are 32-bit


def read_config(model: ModelFiles, dtype: DTypeChoice = "auto") -> ModelConfig:
    """Returns the model's shape from ``config.json``, with its own dtype (see ``own_dtype``) or the requested
    one.

    It raises ValueError, naming the file, if the file is absent, malformed or of an unsupported model.
    """
    source = check_source(model)
    path, hf = source.config_path, source.config()
    hf["dtype"] = own_dtype(source, hf) if dtype == "auto" else dtype
    source.quantisation()  # what is not read is refused here already
    with named(path):
        cfg = model_config(hf)
        longest = cfg.longest_context
    if longest > LONGEST:
        raise ValueError(f"{path}: a context of {longest} tokens exceeds {LONGEST}")
    return cfg


def check_source(model: ModelFiles) -> Source:
    """Returns the files of a model; raises ValueError if it is neither a directory nor a GGUF file."""
    source = source_of(model)
    path = source.path
    if not path.is_dir() and not is_gguf(path):
        what = "is a file; give its directory" if path.exists() else "is not a directory"
        raise ValueError(f"{str(path)!r} {what}, and no model of the Hub is named so (ORG/NAME)")
    return source


def load_model(
    directory: Path | str,
    mesh: Mesh,
    moe: MoEConfig | None = None,
    dtype: DTypeChoice = "auto",
    progress: LoadProgress | None = None,
    placement: Placement | None = None,
    context: int | None = None,
    quantize: Quantize | None = None,
) -> Decoder:
    """Returns the model of ``directory`` with its parameters on ``mesh``, sharded as they declare.

    It needs host memory for the whole model on CPU, otherwise for one parameter, and for one tensor of each
    of a few threads. It raises ValueError, before any memory is allocated, for a name or shape that is not
    exactly the model's; also for the placement of another model.

    dtype: requested dtype; "auto" keeps the checkpoint's dtype, and for routers and vectors each tensor's
        own.
    progress: function called with (bytes done, bytes in all) after each parameter.
    placement: placement by which the experts are renumbered.
    context: tokens of the longest sequence; by default the model's longest context.
    quantize: how plain weights are quantised while they load; None keeps them.
    """
    source = source_of(directory)
    cfg = read_config(source, dtype)
    codings = read_codings(source, cfg, quantize)
    sized = cfg.for_context(context or cfg.longest_context)
    blueprint = make_blueprint(sized, moe or MoEConfig(), mesh, codings)
    report = (lambda done, total: None) if progress is None else progress
    return load_decoder(source, blueprint, placement, report, own_dtypes=dtype == "auto")


def load_decoder(
    source: Source,
    blueprint: Blueprint,
    placement: Placement | None,
    report: LoadProgress,
    *,
    own_dtypes: bool,
) -> Decoder:
    """Returns what ``load_model`` returns, built as the blueprint says.

    own_dtypes: whether a router or vector that is stored in a wider dtype than the model's stays float32.
    """
    if placement is not None:
        check_fits(placement, blueprint.cfg)
    if is_converted(source.path):
        from jmoe.checkpoint.converted.orbax_io import (
            restore_model,  # heavy, and only converted checkpoints need it
        )

        model = restore_model(source.path, blueprint, placement, report, own_dtypes=own_dtypes)
    else:
        model = read_model(source, blueprint, placement, report, own_dtypes=own_dtypes)
    if placement is not None:
        check_model(placement, model)
    return model


def read_model(
    source: Source,
    blueprint: Blueprint,
    placement: Placement | None,
    report: LoadProgress,
    *,
    own_dtypes: bool,
) -> Decoder:
    """Returns the model of a Hugging Face directory or a GGUF file, read one parameter at a time, and of each
    parameter several tensors at once.

    own_dtypes: whether a router or vector that is stored in a wider dtype than the model's stays float32.
    """
    with source.open() as checkpoint, Workers() as workers:
        model, specs, table = match(checkpoint, blueprint, placement, own_dtypes=own_dtypes)
        total, done, arrays = sum(s.nbytes for s in specs.values()), 0, {}
        for path, spec in specs.items():
            buffer = read_param(checkpoint, spec, table[path], workers)
            if placement is not None:
                permute_gate(path, buffer, placement, blueprint.cfg.moe_layers)
            # on CPU the buffer becomes the parameter; on other devices it is freed with the next parameter
            arrays[path] = jax.block_until_ready(spec.in_memory(put_on_mesh, buffer))
            done += spec.nbytes
            report(done, total)
    return fill(model, arrays)


def match(
    checkpoint: Checkpoint, blueprint: Blueprint, placement: Placement | None = None, *, own_dtypes: bool
) -> tuple[Decoder, dict[str, ParamSpec], dict[str, list[StoredParam]]]:
    """Returns the abstract model, its parameters and the tensors that fill each; checks every name and shape.

    If the checkpoint has a head of its own, the model has one too, whatever the configuration says.

    own_dtypes: whether a router or vector that is stored in a wider dtype than the model's stays float32.
    """
    cfg = with_own_head(checkpoint, blueprint.cfg)
    tensors = listed(checkpoint, cfg)
    model, specs = abstract_decoder(replace(blueprint, cfg=cfg))
    table = tensors_by_path(tensors)
    if own_dtypes:
        wide = {
            path
            for path, spec in specs.items()
            if any(
                spec.has_own_dtype
                and s.format is None
                and is_wider(checkpoint.tensors[s.name].dtype, spec.dtype)
                for s in table.get(path, ())
            )
        }
        specs = {path: spec.in_float32() if path in wide else spec for path, spec in specs.items()}
    if placement is not None:
        table = into_slots(table, placement, cfg.moe_layers)
    if blueprint.moe.offload is not None:
        table = into_stacks(table, cfg.moe_layers)
    for path in specs.keys() - table.keys():
        table[path] = []
    check_shapes(checkpoint, table, specs)
    return model, specs, table


def read_param(
    checkpoint: Checkpoint, spec: ParamSpec, tensors: list[StoredParam], workers: Workers
) -> Buffer:
    """Returns one parameter in the checkpoint's dtype, each tensor read straight into its slice of one
    buffer, or of the buffers of a quantised parameter."""
    if not tensors:
        return entry_numbers(spec)
    buffer = jax.tree.map(lambda array: aligned_empty(array.shape, array.dtype), spec.arrays)

    def read(stored: StoredParam) -> None:
        read_slice(checkpoint, stored, stored.part_of(buffer), spec.written)

    workers.each(read, tensors)
    return buffer


def parameter_specs(
    model: ModelFiles, cfg: ModelConfig, dtype: DTypeChoice, codings: Codings
) -> dict[str, ParamSpec]:
    """Returns the parameters as ``load_model`` would make them on one device; by ``cfg`` alone if the
    directory has no weights. It raises ValueError for weights that ``load_model`` would reject without
    reading them.

    codings: how they are kept, as ``read_codings`` returns it.
    """
    source = source_of(model)
    blueprint = make_blueprint(cfg, MoEConfig(), make_mesh(), codings)
    if is_converted(source.path):
        from jmoe.checkpoint.converted.orbax_io import expected_model  # heavy, as above

        return expected_model(source.path, read_manifest(source.path), blueprint, own_dtypes=dtype == "auto")[
            1
        ]
    if not source.has_weights():
        return abstract_decoder(blueprint)[1]
    with source.open() as checkpoint:
        return match(checkpoint, blueprint, own_dtypes=dtype == "auto")[1]
