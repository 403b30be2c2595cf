"""The data that all implementations take: stacked weights of E gated MLPs, and the activation's name."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jmoe_kernels.quantised import Coding, Quantised, coding_of, dtype_of
from jmoe_kernels.settings import Activation

# how gate and up, and down, are stored; None is not quantised
ExpertCodings = tuple[Coding | None, Coding | None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertWeights:
    """Stacked weights in the checkpoint's ``[out, in]`` layout.

    gate_up_E2FD: weights ``[experts, (gate, up), inner, model]``, float32, bfloat16 or quantised; a CPU
        stores bfloat16 as uint16 (see ``storage_dtype``).
    down_EDF: weights ``[experts, model, inner]``, whose products have the same dtype.
    gate_up_bias_E2F: biases of gate and up, float32 or as the weights are.
    down_bias_ED: biases of down, likewise.
    """

    gate_up_E2FD: Shaped[Array, "E 2 F D"] | Quantised
    down_EDF: Shaped[Array, "E D F"] | Quantised
    gate_up_bias_E2F: Float[Array, "E 2 F"] | None = None
    down_bias_ED: Float[Array, "E D"] | None = None

    @property
    def dims(self) -> tuple[int, int, int]:
        """Returns (experts, inner, model)."""
        experts, _, inner, model = self.gate_up_E2FD.shape
        return experts, inner, model

    @property
    def dtype(self) -> jnp.dtype:
        """Returns the dtype of the products, which is bfloat16 if weights are stored as uint16."""
        return dtype_of(self.gate_up_E2FD)

    @property
    def codings(self) -> ExpertCodings:
        """Returns how gate and up, and down, are stored."""
        return coding_of(self.gate_up_E2FD), coding_of(self.down_EDF)


def gated(activation: Activation, gate: Array, up: Array) -> Array:
    """Returns ``act(gate) * up`` in the inputs' dtype.

    "swiglu_oai" is gpt-oss's: ``gate * sigmoid(1.702 gate) * (up + 1)``, with gate at most 7 and up within 7.
    """
    if activation == "silu":
        return gate * jax.nn.sigmoid(gate) * up
    if activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    if activation == "relu":
        return jnp.maximum(gate, 0) * up
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
