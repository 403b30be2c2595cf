"""Resolves a model and settings for this machine, once: ``serve`` runs the result, ``doctor`` reports it.

**Memory.** What does not fit is refused in one line that has the sizes, before weights are read. Weights come
first, then what a step needs, then the pages of the KV cache. Without ``kv_memory`` the pages are those of
``max_num_seqs`` whole contexts, but at most 2 GiB or one context, and at most half of what is left. If they
do not hold one context, the line names the ``max_model_len`` that they do hold. If ``kv_memory`` does not
hold the model's own context, the context is shortened and the log says so; a requested context is refused
instead. Several processes must compute the same sizes without communicating, so their pages do not depend on
what a machine has left.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from jax.sharding import Mesh
from jmoe_kernels.backends import Executor
from jmoe_kernels.grouped_mlp import IMPLEMENTATIONS
from jmoe_kernels.matmul import why_dequantised
from jmoe_kernels.quantised import Coding

from jmoe.blueprint import Blueprint
from jmoe.checkpoint.params import ParamSpec, abstract_decoder, dense_kernel
from jmoe.checkpoint.quantised.codings import read_codings
from jmoe.checkpoint.source import Source, WithoutWeights, source_of
from jmoe.config.model import ModelConfig
from jmoe.engine.deployment.artifacts import read_placement, read_profile
from jmoe.engine.deployment.needs import Memory, check_memory, needed
from jmoe.engine.deployment.settings import EngineSettings, model_directory, read_model
from jmoe.engine.deployment.sizes import PAGE_SIZE, context_length, fit_pages, sizes_for
from jmoe.engine.offload.build import pick_executor
from jmoe.engine.step.inputs import Sizes
from jmoe.mesh import Split, make_mesh, split_attention
from jmoe.models.decoder import make_blueprint
from jmoe.nn.kinds import page_bytes
from jmoe.placement.placement import Placement
from jmoe.placement.profile import Profile


@dataclass(frozen=True)
class Deployment:
    """The result of a model and of settings on this machine.

    source: files of the model.
    settings: settings of the user.
    blueprint: model for contexts of ``max_model_len`` tokens, mesh and kernels.
    max_model_len: tokens of a context.
    sizes: shapes that compile.
    memory: memory needed and available.
    placement: placement by which experts are renumbered and tokens are shuffled; None without one.
    profile: profile from which an expert cache starts; None starts cold.
    executor: executor of the steps and the reason for its choice; None if no experts are offloaded.
    notes: what the user should know about settings that were changed or have no effect, and about weights
        for which there is no kernel, a line each.
    """

    source: Source
    settings: EngineSettings
    blueprint: Blueprint
    max_model_len: int
    sizes: Sizes
    memory: Memory
    placement: Placement | None
    profile: Profile | None
    executor: tuple[Executor, str] | None
    notes: tuple[str, ...]

    @property
    def directory(self) -> Path:
        """The directory of the model, or its GGUF file."""
        return self.source.path

    @property
    def cfg(self) -> ModelConfig:
        return self.blueprint.cfg

    @property
    def mesh(self) -> Mesh:
        return self.blueprint.mesh


def resolve(model: str | Path | WithoutWeights, settings: EngineSettings) -> Deployment:
    """Resolves a model and its settings; raises ValueError if either is refused or does not fit the
    machine."""
    files = model if isinstance(model, WithoutWeights) else model_directory(model)
    source, moe = source_of(files), settings.moe
    cfg = read_model(source, settings)
    split = settings_split(settings)
    requested = context_length(cfg, settings.max_model_len)
    codings = read_codings(source, cfg, settings.quantization_request)
    memory = needed(cfg, settings, split, requested, codings)
    check_memory(memory)
    length, pages, notes = fit_pages(cfg, settings, split, requested, memory.left)
    held = pages * page_bytes(cfg, split, PAGE_SIZE) // split.head_ranks
    memory = replace(needed(cfg, settings, split, length, codings), pages=held)
    check_memory(memory)
    blueprint = make_blueprint(cfg.for_context(length), moe, split.mesh, codings, settings.activation_dtype)
    return Deployment(
        source=source,
        settings=settings,
        blueprint=blueprint,
        max_model_len=length,
        sizes=sizes_for(settings, split, length, pages),
        memory=memory,
        placement=read_placement(moe.shuffle, cfg, split.mesh),
        profile=read_profile(moe.offload),
        executor=None if moe.offload is None else pick_executor(moe.offload, split.mesh),
        notes=(
            *notes,
            *settings.without_effect(*split.mesh.shape.values()),
            *_unused_activations(blueprint),
            *_dequantised_in_steps(blueprint),
        ),
    )


def _unused_activations(blueprint: Blueprint) -> tuple[str, ...]:
    """Returns a line for each reason for which activations that are to be rounded are not."""
    kernels = blueprint.kernels
    if kernels.activations == "auto":
        return ()
    text = f"activation_dtype = {kernels.activations!r} has no effect"
    if not blueprint.codings:
        return (f"{text} because no weight is quantised",)
    found = _quantised_weights(blueprint, lambda spec, coding: _why_unrounded(spec, coding, blueprint))
    return tuple(f"{text} on {weights}; {why}" for why, weights in found.items())


def _why_unrounded(spec: ParamSpec, coding: Coding, blueprint: Blueprint) -> str | None:
    if spec.products == "dense":
        return why_dequantised(dense_kernel(spec, blueprint), coding)
    why = IMPLEMENTATIONS[blueprint.kernels.experts].why_unrounded
    return f"{blueprint.kernels.experts!r} multiplies with no codes" if why is None else why(coding)


def _dequantised_in_steps(blueprint: Blueprint) -> tuple[str, ...]:
    """Returns a line for each reason for which quantised dense weights are dequantised in every step. The
    same of experts is the reason for their kernel."""

    def why(spec: ParamSpec, coding: Coding) -> str | None:
        return why_dequantised(dense_kernel(spec, blueprint), coding) if spec.products == "dense" else None

    found = _quantised_weights(blueprint, why)
    return tuple(f"dense weights that are dequantised in every step: {w}; {why}" for why, w in found.items())


def _quantised_weights(
    blueprint: Blueprint, why: Callable[[ParamSpec, Coding], str | None]
) -> dict[str, str]:
    """Returns the quantised weights for which ``why`` gives a reason, in a few words, by that reason."""
    paths: dict[str, list[str]] = {}
    for path, spec in abstract_decoder(blueprint)[1].items() if blueprint.codings else ():
        if spec.coding is not None and (reason := why(spec, spec.coding)) is not None:
            paths.setdefault(reason, []).append(path)
    return {reason: f"{len(found)}, such as {found[0]}" for reason, found in paths.items()}


def settings_split(settings: EngineSettings) -> Split:
    """Returns the mesh of the settings' sizes, and how attention is split over it."""
    sizes = settings.data_parallel_size, settings.expert_parallel_size, settings.tensor_parallel_size
    return split_attention(make_mesh(*sizes), settings.attention)
