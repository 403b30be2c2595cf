"""What every implementation takes: the stacked weights of E gated MLPs, and the name of their activation."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

Activation = Literal["silu", "gelu_tanh", "relu", "swiglu_oai"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertWeights:
    """Stacked weights in the checkpoint's ``[out, in]`` layout.

    gate_up_E2FD: ``[experts, (gate, up), inner, model]``; down_EDF: ``[experts, model, inner]``; bfloat16 (on
    CPU stored as uint16, see ``storage_dtype``) or float32. Biases are float32 or as the
    weights are.
    """

    gate_up_E2FD: Shaped[Array, "E 2 F D"]
    down_EDF: Shaped[Array, "E D F"]
    gate_up_bias_E2F: Float[Array, "E 2 F"] | None = None
    down_bias_ED: Float[Array, "E D"] | None = None

    @property
    def dims(self) -> tuple[int, int, int]:
        """(experts, inner, model)."""
        experts, _, inner, model = self.gate_up_E2FD.shape
        return experts, inner, model

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the numbers: bfloat16 where it is stored as uint16."""
        dtype = self.gate_up_E2FD.dtype
        return jnp.dtype(jnp.bfloat16) if dtype == jnp.uint16 else dtype


def gated(activation: Activation, gate: Array, up: Array) -> Array:
    """``act(gate) * up`` in the inputs' dtype.

    "swiglu_oai" is gpt-oss's: gate at most 7, up within 7, ``gate * sigmoid(1.702 gate) * (up + 1)``.
    """
    if activation == "silu":
        return gate * jax.nn.sigmoid(gate) * up
    if activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    if activation == "relu":
        return jnp.maximum(gate, 0) * up
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
