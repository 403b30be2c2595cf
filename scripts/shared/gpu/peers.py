"""Makes what ``gpu_check.py`` times and times it: inputs, jmoe's layer, its bounds and its peers."""

import functools
import importlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jmoe_kernels.grouped_mlp.pallas_gpu import Blocks, grouped_mlp_pallas_gpu
from jmoe_kernels.grouped_mlp.types import Activation, ExpertWeights, gated

CACHE = 64e6  # bytes; the weights of a rotation must be several times as large


# ---- timing


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


# ---- inputs


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_weights(key: Array, experts: int, inner: int, model: int) -> ExpertWeights:
    a, b = jax.random.split(key)
    gate_up = jax.random.normal(a, (experts, 2, inner, model), jnp.bfloat16) * model**-0.5
    down = jax.random.normal(b, (experts, model, inner), jnp.bfloat16) * inner**-0.5
    return ExpertWeights(gate_up.astype(jnp.bfloat16), down.astype(jnp.bfloat16))


def random_rows(rows: int, model: int, seed: int = 0) -> Array:
    return jax.random.normal(jax.random.key(seed), (rows, model), jnp.bfloat16)


def routed_sizes(tokens: int, experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    """Returns the rows of each expert when every token draws ``top_k`` distinct experts uniformly."""
    rng = np.random.default_rng(seed)
    picks = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    return np.bincount(picks.ravel(), minlength=experts).astype(np.int32)


def weight_stacks(dims: tuple[int, int, int], dry: bool) -> list[ExpertWeights]:
    count = 1 if dry else stack_count(weight_bytes(dims, dims[0]))
    return [random_weights(jax.random.key(i), *dims) for i in range(count)]


def weight_bytes(dims: tuple[int, int, int], active: int) -> float:
    return 2.0 * 3 * dims[1] * dims[2] * active


# ---- the contenders: each is a function (x, weights) -> y at fixed group sizes


def ours(sizes: np.ndarray, dry: bool, activation: Activation = "silu") -> Callable:
    blocks = Blocks("decode", 16, 64, 64, 64, 64, 2, 2) if dry else None
    options = {"activation": activation, "interpret": dry, "blocks": blocks}
    return lambda x, w: grouped_mlp_pallas_gpu(x, w, jnp.asarray(sizes), **options)


def by_ragged_dot(sizes: np.ndarray, product: Callable = lax.ragged_dot) -> Callable:
    """Returns the layer as ragged products [rows, K] x [experts, K, out], with the activation between."""

    def mlp(x, w):
        experts, inner, model = w.dims
        gate_up = w.gate_up_E2FD.reshape(experts, 2 * inner, model).swapaxes(1, 2)
        gu = product(x, gate_up, jnp.asarray(sizes)).astype(jnp.float32)
        h = gated("silu", gu[:, :inner], gu[:, inner:]).astype(x.dtype)
        return product(h, w.down_EDF.swapaxes(1, 2), jnp.asarray(sizes))

    return mlp


def one_group(x: Array, w: ExpertWeights) -> Array:
    """Returns all rows after the first expert. This is the dense bound."""
    _, inner, model = w.dims
    gu = x @ w.gate_up_E2FD[0].reshape(2 * inner, model).T
    return gated("silu", gu[:, :inner], gu[:, inner:]) @ w.down_EDF[0].T


def even_batch(x: Array, w: ExpertWeights) -> Array:
    """Returns the rows after an even split over all experts, as one batched product.

    This is the bound that reads every weight once.
    """
    experts, inner, model = w.dims
    rows = -(-x.shape[0] // experts)
    x_ECD = jnp.pad(x, ((0, rows * experts - x.shape[0]), (0, 0))).reshape(experts, rows, model)
    gu = jnp.einsum("ecd,efd->ecf", x_ECD, w.gate_up_E2FD.reshape(experts, 2 * inner, model))
    return jnp.einsum("ecf,edf->ecd", gated("silu", gu[..., :inner], gu[..., inner:]), w.down_EDF)


def jax_peers(sizes: np.ndarray) -> dict[str, Callable]:
    peers = {"ragged_dot": by_ragged_dot(sizes)}
    try:
        tokamax = importlib.import_module("tokamax")
    except Exception:  # the peer is optional, whatever the reason why its import fails
        return peers
    peers["tokamax ragged_dot"] = by_ragged_dot(sizes, tokamax.ragged_dot)
    return peers


def torch_seconds(sizes: np.ndarray, dims: tuple[int, int, int], dry: bool) -> float | None:
    """Returns the seconds of torch._grouped_mm for the layer in a CUDA graph, None if torch has no CUDA."""
    if dry:
        return None
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    if not torch.cuda.is_available() or not hasattr(torch, "_grouped_mm"):
        return None
    experts, inner, model = dims
    new = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    stacks = [
        (new(experts, 2 * inner, model) * model**-0.5, new(experts, model, inner) * inner**-0.5)
        for _ in range(stack_count(weight_bytes(dims, experts)))
    ]
    x, ends = new(int(sizes.sum()), model), torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)

    def run():
        for gate_up, down in stacks:
            gate, up = torch._grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
            h = torch.nn.functional.silu(gate) * up
            torch._grouped_mm(h, down.transpose(1, 2), offs=ends)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / len(stacks))
    return statistics.median(times)
