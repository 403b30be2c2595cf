"""Plain copies of quantised models: the oracle of everything that computes with quantised weights."""

import jax
import numpy as np
from flax import nnx
from jmoe_kernels.quantised import Quantised, dequantised

from jmoe.models.decoder import Decoder


def plain_values(model: Decoder) -> dict[str, np.ndarray]:
    """Returns the numbers of each parameter by its path, float32, dequantised by numpy."""

    def numbers(value) -> np.ndarray:
        if isinstance(value, Quantised):
            return dequantised(jax.tree.map(np.asarray, value))
        array = np.asarray(value)
        return array if array.dtype.kind == "i" else array.astype(np.float32)

    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, keys)): numbers(param.get_value()) for keys, param in flat}


def quantised_paths(model: Decoder) -> set[str]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, k)) for k, p in flat if isinstance(p.get_value(), Quantised)}
