"""Makes what ``gpu_check.py`` times: jmoe's layer, its bounds and its peers, at fixed group sizes.

A contender is a function (x, weights) -> y; torch's is timed here, because it is not jax's.
"""

import functools
import importlib
import statistics
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jmoe_kernels.grouped_mlp.pallas_gpu import BlockSizes, grouped_mlp_pallas_gpu
from jmoe_kernels.grouped_mlp.types import ExpertWeights, gated
from jmoe_kernels.quantised import as_float
from jmoe_kernels.settings import Activation
from shared.gpu_timing import stack_count, weight_bytes


def routed_sizes(tokens: int, experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    """Returns the rows of each expert when every token draws ``top_k`` distinct experts uniformly."""
    rng = np.random.default_rng(seed)
    picks = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    return np.bincount(picks.ravel(), minlength=experts).astype(np.int32)


def ours(sizes: np.ndarray, dry: bool, activation: Activation = "silu") -> Callable:
    blocks = BlockSizes("decode", 16, 64, 64, 64, 64, 2, 2) if dry else None
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
    gu = x @ as_float(w.gate_up_E2FD)[0].reshape(2 * inner, model).T
    return gated("silu", gu[:, :inner], gu[:, inner:]) @ as_float(w.down_EDF)[0].T


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
