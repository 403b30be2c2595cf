"""``load_model``: loads a directory of weights, Hugging Face's or a converted one, as a Decoder on a mesh."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from jmoe.blueprint import Blueprint
from jmoe.checkpoint.converted.manifest import is_converted, read_manifest
from jmoe.checkpoint.facts import (
    embedding_names,
    is_wider,
    own_dtype,
    stored_tensors,
    with_own_head,
)
from jmoe.checkpoint.hf_reader import Checkpoint, aligned_empty
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
from jmoe.checkpoint.renumber import check_fits, check_model, into_slots, permute_gate
from jmoe.checkpoint.slices import Buffer, check_shapes, read_slice
from jmoe.checkpoint.source import is_gguf, source_of
from jmoe.checkpoint.stacks import into_stacks
from jmoe.config.choices import DTypeChoice
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.reading import named
from jmoe.config.units import brief
from jmoe.mesh import make_mesh
from jmoe.models import model_config
from jmoe.models.decoder import Decoder, make_blueprint
from jmoe.placement.placement import Placement

LoadProgress = Callable[[int, int], None]
LONGEST = 2**31 - 1  # tokens of a context: positions are 32-bit


def read_config(directory: Path | str, dtype: DTypeChoice = "auto") -> ModelConfig:
    """Returns the model's shape from ``config.json``, with its own dtype (see ``own_dtype``) or the requested
    one.

    It raises ValueError, naming the file, if the file is absent, malformed or of an unsupported model.
    """
    directory = check_directory(directory)
    source = source_of(directory)
    path, hf = source.config_path, source.config()
    hf["dtype"] = own_dtype(directory, hf) if dtype == "auto" else dtype
    source.quantisation()  # what is not read is refused here already
    with named(path):
        cfg = model_config(hf)
        longest = cfg.longest_context
    if longest > LONGEST:
        raise ValueError(f"{path}: a context of {longest} tokens exceeds {LONGEST}")
    return cfg


def check_directory(directory: Path | str) -> Path:
    """Returns the path of a model; raises ValueError if it is neither a directory nor a GGUF file."""
    path = source_of(directory).path
    if not path.is_dir() and not is_gguf(path):
        what = "is a file; give its directory" if path.exists() else "is not a directory"
        raise ValueError(f"{str(directory)!r} {what} (nothing is ever downloaded: models are local folders)")
    return path


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

    It needs host memory for the whole model on CPU, otherwise for one parameter. It raises ValueError, before
    any memory is allocated, for a name or shape that is not exactly the model's; also for the placement of
    another model.

    dtype: requested dtype; "auto" keeps the checkpoint's dtype, and for routers and vectors each tensor's
        own.
    progress: function called with (bytes done, bytes in all) after each parameter.
    placement: placement by which the experts are renumbered.
    context: tokens of the longest sequence; by default the model's longest context.
    quantize: how plain weights are quantised while they load; None keeps them.
    """
    cfg = read_config(directory, dtype)
    codings = read_codings(Path(directory), cfg, quantize)
    sized = cfg.for_context(context or cfg.longest_context)
    blueprint = make_blueprint(sized, moe or MoEConfig(), mesh, codings)
    report = (lambda done, total: None) if progress is None else progress
    return load_decoder(directory, blueprint, placement, report, own_dtypes=dtype == "auto")


def load_decoder(
    directory: Path | str,
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
    if is_converted(directory):
        from jmoe.checkpoint.converted.orbax_io import (
            restore_model,  # heavy, and only converted checkpoints need it
        )

        model = restore_model(Path(directory), blueprint, placement, report, own_dtypes=own_dtypes)
    else:
        model = read_model(directory, blueprint, placement, report, own_dtypes=own_dtypes)
    if placement is not None:
        check_model(placement, model)
    return model


def read_model(
    directory: Path | str,
    blueprint: Blueprint,
    placement: Placement | None,
    report: LoadProgress,
    *,
    own_dtypes: bool,
) -> Decoder:
    """Returns the model of a Hugging Face directory, read one parameter at a time.

    own_dtypes: whether a router or vector that is stored in a wider dtype than the model's stays float32.
    """
    with source_of(directory).open() as checkpoint:
        model, specs, table = match(checkpoint, blueprint, placement, own_dtypes=own_dtypes)
        total, done, arrays = sum(s.nbytes for s in specs.values()), 0, {}
        for path, spec in specs.items():
            buffer = read_param(checkpoint, spec, table[path])
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
    check_names(checkpoint, cfg)
    model, specs = abstract_decoder(replace(blueprint, cfg=cfg))
    table = tensors_by_path(stored_tensors(checkpoint, cfg))
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
    check_shapes(checkpoint.tensors, table, specs)
    return model, specs, table


def read_param(checkpoint: Checkpoint, spec: ParamSpec, tensors: list[StoredParam]) -> Buffer:
    """Returns one parameter in the checkpoint's dtype, each tensor read straight into its slice of one
    buffer, or of the buffers of a quantised parameter."""
    if not tensors:
        return entry_numbers(spec)
    buffer = jax.tree.map(lambda array: aligned_empty(array.shape, array.dtype), spec.arrays)
    for stored in tensors:
        read_slice(checkpoint, stored, stored.part_of(buffer), spec.written)
    return buffer


def check_names(checkpoint: Checkpoint, cfg: ModelConfig) -> None:
    """Raises ValueError unless the checkpoint has exactly the family's tensors.

    Some extra tensors are allowed and not read: the head of a tied model, which ``with_own_head`` has found
    equal to the embedding, those that the checkpoint ignores, and scales of activations next to quantised
    weights.
    """
    expected, quantisation = set(), source_of(checkpoint.directory).quantisation()
    for stored in stored_tensors(checkpoint, cfg):
        for name in stored.names:
            if name not in checkpoint.tensors:  # fails at the first: an absurd num_hidden_layers ends here
                raise ValueError(
                    f"{checkpoint.directory}: tensor {brief(name)} of {cfg.architecture} is missing"
                )
            expected.add(name)
    _, head = embedding_names(checkpoint, cfg)
    for name, info in checkpoint.tensors.items():
        if name in expected:
            continue
        tied_head = cfg.tie_word_embeddings and name == head
        if not tied_head and not quantisation.is_unread(name) and not checkpoint.is_ignored(cfg, name):
            raise ValueError(
                f"{info.file}: tensor {brief(name)} is not one of {cfg.architecture} as config.json has it"
            )


def parameter_specs(
    directory: Path | str, cfg: ModelConfig, dtype: DTypeChoice, quantize: Quantize | None = None
) -> dict[str, ParamSpec]:
    """Returns the parameters as ``load_model`` would make them on one device; by ``cfg`` alone if the
    directory has no weights. It raises ValueError for weights that ``load_model`` would reject without
    reading them."""
    directory = Path(directory)
    codings = read_codings(directory, cfg, quantize)
    blueprint = make_blueprint(cfg, MoEConfig(), make_mesh(), codings)
    if is_converted(directory):
        from jmoe.checkpoint.converted.orbax_io import expected_model  # heavy, as above

        return expected_model(directory, read_manifest(directory), blueprint, own_dtypes=dtype == "auto")[1]
    source = source_of(directory)
    if not source.has_weights():
        return abstract_decoder(blueprint)[1]
    with source.open() as checkpoint:
        return match(checkpoint, blueprint, own_dtypes=dtype == "auto")[1]
