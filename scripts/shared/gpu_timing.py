"""Times a layer on a GPU: chained calls of one compiled loop that uses several sets of weights in turn."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jmoe_kernels.grouped_mlp.types import ExpertWeights

CACHE = 64e6  # bytes; the weights of a rotation must be several times as large


def seconds_per_call(
    step: Callable, x: Array, stacks: list, dry: bool, calls: int = 24, rounds: int = 5
) -> float:
    """Returns the median seconds of ``step(x, weights) -> array``. One compiled loop chains the calls.

    step: the function that is timed.
    x: its first argument.
    stacks: equal pytrees of weights, which are used in turn.
    dry: whether there is only one call of each and one round.
    calls: the number of calls in a round.
    rounds: the number of rounds.
    """
    turns = max(1, (1 if dry else calls) // len(stacks))

    @jax.jit
    def loop(x, stacks):
        def turn(_, last):
            for weights in stacks:
                # The barriers keep every call, whole and in order, and copy nothing.
                tied, _ = lax.optimization_barrier((x, last))
                y = lax.optimization_barrier(step(tied, weights))
                last = y.ravel()[0].astype(jnp.float32)
            return last

        return lax.fori_loop(0, turns, turn, jnp.float32(0))

    jax.block_until_ready(loop(x, stacks))
    times = []
    for _ in range(1 if dry else rounds):
        start = time.perf_counter()
        jax.block_until_ready(loop(x, stacks))
        times.append((time.perf_counter() - start) / (turns * len(stacks)))
    return statistics.median(times)


def stack_count(bytes_each: float) -> int:
    """Returns the number of weight stacks that together exceed four times the cache, 2 to 8."""
    return int(min(8, max(2, 4 * CACHE // bytes_each + 1)))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_weights(key: Array, experts: int, inner: int, model: int) -> ExpertWeights:
    a, b = jax.random.split(key)
    gate_up = jax.random.normal(a, (experts, 2, inner, model), jnp.bfloat16) * model**-0.5
    down = jax.random.normal(b, (experts, model, inner), jnp.bfloat16) * inner**-0.5
    return ExpertWeights(gate_up.astype(jnp.bfloat16), down.astype(jnp.bfloat16))


def random_rows(rows: int, model: int, seed: int = 0) -> Array:
    return jax.random.normal(jax.random.key(seed), (rows, model), jnp.bfloat16)


def weight_stacks(dims: tuple[int, int, int], dry: bool) -> list[ExpertWeights]:
    count = 1 if dry else stack_count(weight_bytes(dims, dims[0]))
    return [random_weights(jax.random.key(i), *dims) for i in range(count)]


def weight_bytes(dims: tuple[int, int, int], active: int) -> float:
    return 2.0 * 3 * dims[1] * dims[2] * active
