"""The matrix product of everything dense: ``x @ w.T`` in the weights' dtype, float32 out.

Four facts of XLA:CPU shaped it; docs/cpu.md has measurements of the first and the last:

* a bfloat16 dot is native only as ``bf16 x bf16 -> f32`` and with two rows or more; one row falls to a path
  seven times slower, so a single row is padded;
* weights in the checkpoint's ``[out, in]`` layout are as fast as transposed ones, so nothing is transposed;
* the transpose rule of such a dot multiplies a float32 cotangent with bfloat16 weights, which upcasts the
  weights. The gradient below rounds the cotangent instead, and takes the weight gradient in float32;
* a float32 dot into which XLA fuses the producer of an operand runs up to eight times slower, hence the
  barrier before both products of the gradient.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jmoe_kernels import cpu
from jmoe_kernels.backends import DenseKernel
from jmoe_kernels.quantised import Coding, Quantised, as_float
from jmoe_kernels.settings import Activations


def dot(form: str, a: Array, b: Array) -> Array:
    """Computes an einsum in the dtype of ``b``, with a float32 result."""
    a = a.astype(b.dtype)
    return jnp.einsum(form, a, b, precision=precision(b.dtype), preferred_element_type=jnp.float32)


def precision(dtype: jnp.dtype) -> lax.Precision:
    """Returns the precision of a product of this dtype, such that float32 means float32.

    By default GPUs round float32 factors to 10 bits of mantissa and TPUs to 7.
    """
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def dot_nt(a: Array, b: Array) -> Array:
    """Returns ``a[..., M, K] @ b[..., N, K]^T``, batched over equal leading axes; it sums in float32."""
    nd = a.ndim - 1
    batch = tuple(range(b.ndim - 2))
    if a.ndim == 2 and a.shape[0] == 1 and b.dtype == jnp.bfloat16:
        return dot_nt(jnp.concatenate([a, jnp.zeros_like(a)]), b)[:1]
    dims = (((nd,), (b.ndim - 1,)), (batch, batch))
    return lax.dot_general(a, b, dims, precision(b.dtype), preferred_element_type=jnp.float32)


IMPLEMENTATIONS: dict[DenseKernel, Callable[[Array, Array], Array]] = {
    "xla": lambda x, w: dot_nt(x.astype(w.dtype), w),
    "cpu": cpu.linear,  # it takes matrices, no stacks
}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: Array, w: Array, implementation: DenseKernel) -> Array:
    return IMPLEMENTATIONS[implementation](x, w)


def _linear_fwd(x: Array, w: Array, implementation: DenseKernel) -> tuple[Array, tuple[Array, Array]]:
    return _linear(x, w, implementation), (x, w)


def _linear_bwd(implementation: DenseKernel, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    g, x = lax.optimization_barrier((g, x))
    batch = tuple(range(w.ndim - 2))
    dims_x = (((w.ndim - 1,), (w.ndim - 2,)), (batch, batch))
    dx = lax.dot_general(g.astype(w.dtype), w, dims_x, preferred_element_type=jnp.float32)
    dims_w = (((w.ndim - 2,), (w.ndim - 2,)), (batch, batch))
    dw = lax.dot_general(g, x.astype(jnp.float32), dims_w, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_linear.defvjp(_linear_fwd, _linear_bwd)


def why_dequantised(implementation: DenseKernel, coding: Coding) -> str | None:
    """Returns why an implementation dequantises a matrix before each product, or None if it multiplies with
    the codes."""
    return cpu.limit(coding) if implementation == "cpu" else f"XLA's products take no codes ({coding})"


def linear(
    x: Float[Array, "*B M K"],
    w: Float[Array, "*E N K"] | Quantised,
    implementation: DenseKernel = "xla",
    activations: Activations = "auto",
) -> Float[Array, "*B M N"]:
    """Returns ``x @ w.T`` in float32, computed in the dtype of ``w``.

    x: rows with any leading axes if ``w`` is a matrix, or ``[E, M, K]`` if ``w`` is a stack.
    w: matrix ``[N, K]`` or a stack ``[E, N, K]``; bfloat16 may be stored as uint16. A quantised weight is
        dequantised first, unless the implementation takes its codes.
    implementation: "cpu" runs the C++ kernel for a matrix; a stack always runs in XLA.
    activations: what ``x`` is rounded to if the codes are multiplied.
    """
    if isinstance(w, Quantised) and w.ndim == 2 and why_dequantised(implementation, w.coding) is None:
        flat: Array = cpu.linear(x.reshape(-1, x.shape[-1]), w, activations)
        return flat.reshape(*x.shape[:-1], w.shape[0])
    w = as_float(w)
    if w.ndim > 2:
        return _linear(x, w, "xla")
    flat = _linear(x.reshape(-1, x.shape[-1]), w, implementation)
    return flat.reshape(*x.shape[:-1], w.shape[0])
