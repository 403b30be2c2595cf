"""``load_model``: a directory of weights, Hugging Face's or a converted one, as a Decoder on a mesh."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jmoe.checkpoint.hf_reader import HFCheckpoint, aligned_empty
from jmoe.checkpoint.manifest import is_converted
from jmoe.checkpoint.offload import into_stacks
from jmoe.checkpoint.params import ParamSpec, abstract_decoder, fill, made_up, place, sources
from jmoe.checkpoint.renumber import check_fits, check_model, into_slots, permute_gate
from jmoe.checkpoint.safetensors_file import open_regular, parse_json
from jmoe.checkpoint.slices import check_shapes, read_slice
from jmoe.config import ModelConfig, MoEConfig
from jmoe.models import get_family, model_config
from jmoe.models.decoder import Decoder
from jmoe.models.weights import Stored
from jmoe.moe.placement import Placement
from jmoe.reading import named

DTypeChoice = Literal["auto", "float32", "bfloat16"]
Progress = Callable[[int, int], None]


def read_config(directory: Path | str, dtype: DTypeChoice = "auto") -> ModelConfig:
    """The model's shape from ``config.json``, with its own dtype or the one asked for.

    Raises ValueError, naming the file, where it is absent, malformed or of an unsupported model.
    """
    directory = check_directory(directory)
    path = directory / "config.json"
    with open_regular(path) as file:
        hf = parse_json(file.read(), str(path))
    if dtype != "auto":
        hf["dtype"] = dtype
    elif "float16" in (hf.get("dtype"), hf.get("torch_dtype")):
        raise ValueError(f"{path}: float16 is not computed in; choose dtype 'float32' or 'bfloat16'")
    with named(path):
        return model_config(hf)


def check_directory(directory: Path | str) -> Path:
    path = Path(directory)
    if not path.is_dir():
        what = "is a file; give its directory" if path.exists() else "is not a directory"
        raise ValueError(f"{str(directory)!r} {what} (nothing is ever downloaded: models are local folders)")
    return path


def load_model(
    directory: Path | str,
    mesh: Mesh,
    moe: MoEConfig | None = None,
    dtype: DTypeChoice = "auto",
    progress: Progress | None = None,
    placement: Placement | None = None,
    context: int | None = None,
) -> Decoder:
    """The model of ``directory`` with its parameters on ``mesh``, sharded as they declare.

    dtype: "auto" keeps the checkpoint's. progress: called with (bytes done, bytes in all) after each
    parameter. placement: experts are renumbered by it. context: tokens of the longest sequence; the model's.
    Host memory: the model's on CPU, else one parameter's. Raises ValueError, before any memory is taken, for
    a name or shape that is not exactly the model's; and for the placement of another model.
    """
    cfg = read_config(directory, dtype)
    cfg = dataclasses.replace(cfg, rope=cfg.rope.for_context(context or cfg.max_position_embeddings))
    moe = MoEConfig() if moe is None else moe
    report = (lambda done, total: None) if progress is None else progress
    if placement is not None:
        check_fits(placement, cfg)
    if is_converted(directory):
        from jmoe.checkpoint.orbax_io import restore_model  # heavy, and only converted checkpoints need it

        model = restore_model(Path(directory), cfg, moe, mesh, report, placement)
    else:
        model = read_model(directory, cfg, moe, mesh, report, placement)
    if placement is not None:
        check_model(placement, model)
    return model


def read_model(
    directory: Path | str,
    cfg: ModelConfig,
    moe: MoEConfig,
    mesh: Mesh,
    report: Progress,
    placement: Placement | None,
) -> Decoder:
    """The model of a Hugging Face directory, one parameter at a time."""
    with HFCheckpoint(directory) as checkpoint:
        model, specs, table = match(checkpoint, cfg, moe, mesh, placement)
        total, done, arrays = sum(s.nbytes for s in specs.values()), 0, {}
        for path, spec in specs.items():
            buffer = read_param(checkpoint, spec, table[path])
            if placement is not None:
                permute_gate(path, buffer, placement, cfg.moe_layers)
            # on CPU the buffer becomes the parameter; elsewhere it is free again with the next one
            arrays[path] = jax.block_until_ready(place(buffer, spec))
            done += spec.nbytes
            report(done, total)
    return fill(model, arrays)


def match(
    checkpoint: HFCheckpoint,
    cfg: ModelConfig,
    moe: MoEConfig,
    mesh: Mesh,
    placement: Placement | None = None,
) -> tuple[Decoder, dict[str, ParamSpec], dict[str, list[Stored]]]:
    """The abstract model, its parameters and what fills each, once every name and shape has been checked."""
    check_names(checkpoint, cfg)
    model, specs = abstract_decoder(cfg, moe, mesh)
    table = sources(cfg)
    if placement is not None:
        table = into_slots(table, placement, cfg.moe_layers)
    if moe.offload is not None:
        table = into_stacks(table, cfg.moe_layers)
    for path in specs.keys() - table.keys():
        table[path] = []
    check_shapes(checkpoint.tensors, table, specs)
    return model, specs, table


def read_param(checkpoint: HFCheckpoint, spec: ParamSpec, parts: list[Stored]) -> np.ndarray:
    """One parameter in the checkpoint's dtype, each tensor read straight into its slice of one buffer."""
    if not parts:
        return made_up(spec)
    buffer = aligned_empty(spec.shape, spec.dtype)
    for stored in parts:
        read_slice(checkpoint, stored, buffer[stored.index])
    return buffer


def check_names(checkpoint: HFCheckpoint, cfg: ModelConfig) -> None:
    """Raises ValueError unless the checkpoint has exactly the family's tensors.

    Two extras are known and not read: ``lm_head.weight`` of a tied model (a copy of the embedding) and the
    rotary frequencies that old releases stored; a family may know more.
    """
    family, expected = get_family(cfg.architecture), set()
    for stored in family.names(cfg):
        for name in stored.tensors:
            if name not in checkpoint.tensors:  # raised at the first: an absurd num_hidden_layers ends here
                raise ValueError(f"{checkpoint.directory}: tensor {name!r} of {cfg.architecture} is missing")
            info = checkpoint.tensors[name]
            if stored.part is not None and stored.part >= (*info.shape, 0)[0]:  # an absurd num_experts
                raise ValueError(
                    f"{info.file}: tensor {name!r} has no entry {stored.part}, which config.json asks for: "
                    f"it is {list(info.shape)}"
                )
            expected.add(name)
    for name, info in checkpoint.tensors.items():
        tied_head = cfg.tie_word_embeddings and name == "lm_head.weight"
        known = tied_head or name.endswith(".rotary_emb.inv_freq") or family.ignored(cfg, name)
        if name not in expected and not known:
            raise ValueError(
                f"{info.file}: tensor {name!r} is not one of {cfg.architecture} as config.json has it"
            )
