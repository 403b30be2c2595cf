"""A gather of rows whose gradient is a gather too (a scatter-add is serial on XLA:CPU)."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


@jax.custom_vjp
def take_rows(
    x_ND: Float[Array, "N D"], index_M: Int[Array, " M"], uses_NU: Int[Array, "N U"]
) -> Float[Array, "M D"]:
    """Returns ``x_ND[index_M]``, with zeros where ``index_M`` is N or more.

    uses_NU: for each row of ``x_ND``, the rows of the result to which it is copied; M or more marks an unused
        entry. It must be the exact inverse of ``index_M``, because the gradient is read through it.
    """
    return x_ND.at[index_M].get(mode="fill", fill_value=0)


def _fwd(x_ND: Array, index_M: Array, uses_NU: Array) -> tuple[Array, Array]:
    return take_rows(x_ND, index_M, uses_NU), uses_NU


def _bwd(uses_NU: Array, g_MD: Array) -> tuple[Array, None, None]:
    return jnp.sum(g_MD.at[uses_NU].get(mode="fill", fill_value=0), axis=1), None, None


take_rows.defvjp(_fwd, _bwd)
