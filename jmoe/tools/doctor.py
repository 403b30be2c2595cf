"""``jmoe doctor``: what this machine has, how a model would run on it, and why."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jmoe_kernels.backends import get_backend
from jmoe_kernels.grouped_mlp import storage_dtype
from jmoe_kernels.paged_attention import has_scales

from jmoe import __version__
from jmoe.checkpoint.load import parameter_specs
from jmoe.checkpoint.source import WithoutWeights
from jmoe.engine.deployment.deployment import Deployment, resolve
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.offload.build import count_slots, has_parallel_copies
from jmoe.mesh import TENSOR, platform_of
from jmoe.moe.expert_leaves import expert_bytes, layouts_for, store_codings
from jmoe.nn.kinds import page_bytes
from jmoe.nn.kv_cache import kv_dtype
from jmoe.server.dialects.detect import AUTO
from jmoe.server.template.report import chat_report

PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "safetensors", "tokenizers")


def doctor(
    model: str | Path | WithoutWeights,
    settings: EngineSettings,
    chat_template: str | None = None,
    tool_format: str = AUTO,
) -> dict[str, Any]:
    """Returns the report: versions, devices, and for ``model`` its sizes and every choice with its reason.

    It raises ValueError if the model or the settings would be refused.

    chat_template, tool_format: settings of the server (``ServerSettings``).
    """
    deployment = resolve(model, settings)
    directory, cfg, sizes, memory = deployment.directory, deployment.cfg, deployment.sizes, deployment.memory
    specs = parameter_specs(deployment.source, cfg, settings.dtype, deployment.blueprint.codings)
    return {
        "versions": {"jmoe": __version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "devices": [_device(d) for d in jax.devices()],
        "mesh": dict(deployment.mesh.shape),
        "model": {
            "directory": str(directory),
            "architecture": cfg.architecture,
            "dtype": cfg.dtype,
            "layers": cfg.num_hidden_layers,
            "experts": cfg.num_experts,
            "experts_per_token": cfg.num_experts_per_tok,
            "weight_bytes": sum(spec.nbytes for spec in specs.values()),
            "max_model_len": deployment.max_model_len,
        },
        "kv_cache": {
            "page_size": sizes.page_size,
            "pages_per_rank": sizes.pages_per_rank,
            "bytes_per_rank": sizes.pages_per_rank
            * page_bytes(cfg, deployment.blueprint.split, sizes.page_size),
        },
        "memory_per_device": {
            "weight_bytes": memory.weights,
            "step_bytes": memory.step,
            "count_bytes": memory.counts,
            "program_bytes": memory.programs,
            "kv_bytes": memory.pages,
            "room_bytes": memory.room and memory.room.bytes,
            "room_source": memory.room and memory.room.source,
            "verdict": f"fits: {memory}",
        },
        "notes": list(deployment.notes),
        "shapes": {"decode_sequences": list(sizes.decode), "prefill_tokens": list(sizes.prefill)},
        "choices": _choices(deployment),
        "offload": _offload(deployment),
        "chat": chat_report(directory, chat_template, tool_format),
    }


def _device(device: Any) -> dict[str, Any]:
    memory = device.memory_stats() or {}
    return {"id": device.id, "kind": device.device_kind, "platform": device.platform} | (
        {"memory_bytes": memory["bytes_limit"]} if "bytes_limit" in memory else {}
    )


def _offload(deployment: Deployment) -> dict[str, Any] | None:
    """Returns where the experts are kept; None if all are on the device."""
    cfg, mesh, offload = deployment.cfg, deployment.mesh, deployment.settings.moe.offload
    if offload is None or deployment.executor is None:
        return None
    codings = store_codings(cfg, deployment.blueprint.codings)
    layouts = layouts_for(deployment.blueprint.kernels.experts, codings)
    whole = expert_bytes(cfg, codings, layouts=layouts)
    slots = count_slots(cfg, offload, mesh, codings, layouts)
    one = expert_bytes(cfg, codings, mesh.shape[TENSOR], layouts)
    executor, why = deployment.executor
    return {
        "expert_bytes": whole,
        "host_bytes": len(cfg.moe_layers) * cfg.num_experts * whole,
        "slots": slots,
        "slots_per_layer": slots / len(cfg.moe_layers),
        "pool_bytes": slots * one,
        "aside_bytes": offload.num_extra_experts * one,
        "predictor": offload.predictor,
        "warm": offload.store is not None,
        "eviction": offload.eviction,
        "executor": executor,
        "why": why,
        "copies_beside": has_parallel_copies(mesh),
    }


def _choices(deployment: Deployment) -> list[dict[str, str]]:
    mesh, moe, kernels = deployment.mesh, deployment.settings.moe, deployment.blueprint.kernels
    backend, dtype = get_backend(platform_of(mesh)), jnp.dtype(deployment.cfg.dtype)
    storage, codings = storage_dtype(dtype, platform_of(mesh)), deployment.blueprint.codings
    rows = [
        ("grouped experts", kernels.experts, kernels.why_experts),
        (
            "dense products",
            kernels.dense,
            "XLA's own" if kernels.dense == "xla" else "goes with the experts' kernel",
        ),
        ("paged attention", kernels.attention, kernels.why_attention),
        *([("binning", kernels.binning, kernels.why_binning)] if moe.binning else []),
        (
            "expert weights kept as",
            str(storage),
            backend.why_weight_storage if storage != dtype else "as computed",
        ),
        *([("quantised weights", str(codings), _why_quantised(deployment))] if codings else []),
        ("KV cache kept as", *_kept_cache(deployment)),
        (
            "transport",
            moe.transport if mesh.size > 1 else "local",
            "from the moe config (default: replicated)"
            if mesh.size > 1
            else "all experts are on the one device",
        ),
    ]
    return [{"what": what, "choice": choice, "why": why} for what, choice, why in rows]


def _why_quantised(deployment: Deployment) -> str:
    method = deployment.settings.quantization
    return "as the checkpoint has them" if method is None else f"quantization = {method!r}"


def _kept_cache(deployment: Deployment) -> tuple[str, str]:
    """Returns the dtype in which keys and values are kept, and why."""
    backend = get_backend(platform_of(deployment.mesh))
    cfg, kept = deployment.cfg, kv_dtype(deployment.cfg, deployment.mesh)
    if cfg.kv_cache_dtype == "auto":
        is_own = kept == jnp.dtype(cfg.dtype)
        return str(kept), "as computed" if is_own else backend.why_cache_storage
    if has_scales(deployment.blueprint.kernels.attention):
        return cfg.kv_cache_dtype, "kv_cache_dtype; a float32 scale for each token and head"
    return cfg.kv_cache_dtype, "kv_cache_dtype; without scales: the kernel takes none of single tokens"


def _offload_lines(offload: dict[str, Any]) -> list[str]:
    return [
        f"offload: {offload['host_bytes'] / 2**20:.1f} MiB of experts in host memory, "
        f"{offload['expert_bytes'] / 2**20:.3f} MiB each; on the device {offload['slots']} slots "
        f"({offload['slots_per_layer']:.1f} a layer), {offload['pool_bytes'] / 2**20:.1f} MiB, and "
        f"{offload['aside_bytes'] / 2**20:.1f} MiB set aside for copies",
        f"offload predictor: {offload['predictor']}, {'warm' if offload['warm'] else 'cold'}; "
        f"eviction {offload['eviction']}",
        f"offload executor: {offload['executor']} ({offload['why']})",
    ]


def lines(report: dict[str, Any]) -> list[str]:
    """Returns the report as text."""
    model, kv = report["model"], report["kv_cache"]
    kinds = sorted({d["kind"] for d in report["devices"]})
    return [
        " ".join(f"{name} {v}" for name, v in report["versions"].items()),
        f"devices: {len(report['devices'])} x {', '.join(kinds)}; mesh "
        + " x ".join(f"{axis} {n}" for axis, n in report["mesh"].items()),
        f"model: {model['architecture']} at {model['directory']}, {model['layers']} layers, "
        f"{model['experts']} experts, {model['experts_per_token']} a token, {model['dtype']}, "
        f"{model['weight_bytes'] / 2**20:.1f} MiB",
        f"context: {model['max_model_len']} tokens; "
        f"KV cache {kv['bytes_per_rank'] / 2**20:.1f} MiB a rank in "
        f"{kv['pages_per_rank']} pages of {kv['page_size']} tokens",
        f"memory: {report['memory_per_device']['verdict']}",
        *(f"note: {note}" for note in report["notes"]),
        f"compiled shapes: decode {report['shapes']['decode_sequences']} sequences, "
        f"prefill {report['shapes']['prefill_tokens']} tokens",
        *(f"{row['what']}: {row['choice']} ({row['why']})" for row in report["choices"]),
        *(_offload_lines(report["offload"]) if report["offload"] else []),
        f"tool calls: {report['chat']['tool_format'] or 'none'} ({report['chat']['why']})",
        f"thoughts: {report['chat']['thoughts']}",
    ]
