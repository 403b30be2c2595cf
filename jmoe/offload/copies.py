"""Copies from the experts in host memory to the device, inside a jitted step.

A copy is ``device_put`` of one expert's slice: only that expert's bytes cross, whatever the stack's size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jmoe_kernels.grouped_mlp import ExpertWeights

from jmoe.moe.types import DispatchPlan
from jmoe.offload.slot_table import Copies


def fetch(store: ExpertWeights, flat: Array) -> ExpertWeights:
    """Copies expert ``flat`` of the host stacks ``[L, E, ...]`` to the device, as ``[1, ...]``. A number past
    the last expert gives an arbitrary expert."""
    layers, experts = store.gate_up_E2FD.shape[:2]
    flat = jnp.minimum(flat, layers * experts - 1)

    def copy(stack: Array) -> Array:
        # One axis of experts: the TPU compiler overlaps copies of slices along a single axis with compute.
        each_X = stack.reshape(layers * experts, *stack.shape[2:])
        return jax.device_put(lax.dynamic_slice_in_dim(each_X, flat, 1), jax.memory.Space.Device)

    return jax.tree.map(copy, store)


def install(pool: ExpertWeights, weights: ExpertWeights, slot: Array) -> ExpertWeights:
    """Puts the expert ``weights`` into ``slot`` of the pool and returns the pool; this happens in place if
    the pool is donated."""
    return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, slot, 0), pool, weights)


def copy_in(pool: ExpertWeights, store: ExpertWeights, copies: Copies) -> ExpertWeights:
    """Copies every expert of ``copies`` into its slot of the pool, one after another, and returns the
    pool."""

    def body(i: Array, pool: ExpertWeights) -> ExpertWeights:
        return install(pool, fetch(store, copies.experts_M[i]), copies.slots_M[i])

    return lax.fori_loop(0, copies.num_copies, body, pool)


def stream(
    store: ExpertWeights,
    flat_E: Array,
    plan: DispatchPlan,
    count: Array,
    apply: Callable[[DispatchPlan, ExpertWeights], Array],
    y_TD: Array,
) -> Array:
    """Returns ``y_TD`` plus the output of the first ``count`` groups of ``plan``, whose experts ``flat_E``
    come one by one through a buffer.

    Copy and compute take turns: a copy takes many times as long as the expert's compute, so little is lost.
    If each turn of the loop began the copy of the next expert, one copy would be useless, and the TPU
    compiler starts it after this expert's compute anyway, because a loop carry has one buffer.
    """
    starts_E = jnp.cumsum(plan.group_sizes_L, dtype=jnp.int32) - plan.group_sizes_L

    def body(i: Array, y_TD: Array) -> Array:
        order_N = jnp.roll(plan.order_N, -starts_E[i])
        return y_TD + apply(DispatchPlan(order_N, plan.group_sizes_L[i][None]), fetch(store, flat_E[i]))

    return lax.fori_loop(0, count, body, y_TD)
