"""Measures a layer of Qwen3-30B-A3B's shape on an accelerator at batch 16, with and without half its experts.

Routing, binning and the experts run in one compiled loop that uses several sets of weights in turn
(``shared.gpu_timing``). The gates' logits have a standard deviation of about 1, and the width is calibrated
to halve the experts of the batch.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jmoe_kernels import binning
from jmoe_kernels.grouped_mlp import pick
from shared.gpu_timing import random_rows, seconds_per_call, weight_bytes, weight_stacks
from shared.layer_sizes import LayerSizes, layer_sizes
from studies.binning.speed import HALF, TOKENS, bisect

from jmoe.config.parts import RouterConfig
from jmoe.config.techniques import BinningConfig
from jmoe.moe.binning import get_rule, route_binned
from jmoe.moe.experts import ExpertMath
from jmoe.moe.routing import plan_dispatch, route
from jmoe.moe.types import TokenFlags

QWEN3 = layer_sizes("qwen3-30b-a3b")
TOY = LayerSizes(16, 64, 64, 2)


def measure(dry: bool) -> dict[str, Any] | None:
    """Returns the ``speed_gpu`` part of the results, None after a line if there is no accelerator."""
    platform = jax.default_backend()
    if platform == "cpu" and not dry:
        print("speed --gpu: skipped, jax sees no accelerator here")
        return None
    sizes = TOY if dry else QWEN3
    dims, experts, model, k = sizes.dims, sizes.experts, sizes.model, sizes.routed
    weights, x_TD = weight_stacks(dims, dry), random_rows(TOKENS, model)
    gates = [random_rows(experts, model, seed=10 + i) * model**-0.5 for i in range(len(weights))]
    stacks = list(zip(weights, gates, strict=True))

    def active(width: float | None) -> float:
        """Returns the number of experts to which the batch goes, the mean over the gates."""
        rule = get_rule(BinningConfig(bin_width=width or 1e9), k)
        return sum(float(active_count(x_TD, gate, rule)) for gate in gates) / len(gates)

    union = active(None)
    width, share = bisect(lambda w: active(w) / union, HALF, 0.0, 4.0)
    rule = get_rule(BinningConfig(bin_width=width), k)
    fused, why = binning.pick(platform, binning.BinningNeeds(experts, rule))
    kernel, why_experts = pick(platform, jnp.bfloat16, dims)
    layer = partial(run_layer, k=k, kernel=kernel, platform=platform)
    ways = {"plain": partial(layer, rule=None, stage="xla"), "binned": partial(layer, rule=rule, stage=fused)}
    if fused != "xla":
        ways["binned, stage in XLA"] = partial(layer, rule=rule, stage="xla")
    return {
        "device": jax.devices()[0].device_kind,
        "dims": QWEN3,
        "tokens": TOKENS,
        "width": width,
        "active": {"plain": union, "binned": share * union},
        "expert_bytes": weight_bytes(dims, 1),
        "kernels": f"experts: {why_experts}; binning: {why}",
        "seconds": {name: seconds_per_call(way, x_TD, stacks, dry) for name, way in ways.items()},
    }


def active_count(x_TD: Array, gate_ED: Array, rule: binning.Rule) -> Array:
    logits_TE, flags = gate_logits(x_TD, gate_ED), jnp.ones(x_TD.shape[0], bool)
    ids_TK = route(logits_TE, rule.k, RouterConfig()).ids_TK
    return binning.choose_active(binning.cast_votes(ids_TK, logits_TE, flags, flags, rule), rule).sum()


def gate_logits(x_TD: Array, gate_ED: Array) -> Array:
    return jnp.einsum("td,ed->te", x_TD, gate_ED, preferred_element_type=jnp.float32)


def run_layer(
    x_TD: Array,
    weights_and_gate: Any,
    *,
    k: int,
    kernel: Any,
    platform: str,
    rule: binning.Rule | None,
    stage: Any,
) -> Array:
    """Returns the output of one layer.

    x_TD: layer's input.
    weights_and_gate: experts' weights and the gate.
    k: number of experts of a token.
    kernel: kernel of the experts.
    platform: platform of the device.
    rule: rule of binning; None is plain top-k.
    stage: implementation of binning.
    """
    weights, gate_ED = weights_and_gate
    logits_TE, flags = gate_logits(x_TD, gate_ED), TokenFlags(jnp.ones(x_TD.shape[0], bool))
    if rule is None:
        routing = route(logits_TE, k, RouterConfig())
    else:
        choice = binning.KernelChoice(stage, platform)
        _, routing, _ = route_binned(logits_TE, flags, rule, renormalize=True, choice=choice)
    plan = routing.plan or plan_dispatch(routing.ids_TK, flags.valid_T, 0, weights.dims[0])
    return ExpertMath(kernel, platform)(x_TD, routing.weights_TK, plan, weights)
