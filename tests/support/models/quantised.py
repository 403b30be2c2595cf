"""Plain copies of quantised models: the oracle of everything that computes with quantised weights."""

from dataclasses import replace

import numpy as np
from flax import nnx
from jmoe_kernels.quantised import Quantised, dequantised

from jmoe.checkpoint.hf.writer import canonical
from jmoe.models.decoder import Decoder


def plain_values(model: Decoder) -> dict[str, np.ndarray]:
    """Returns the numbers of each parameter by its path, float32, dequantised by numpy."""

    def numbers(value) -> np.ndarray:
        if isinstance(value, Quantised):
            return _shard_by_shard(value)
        array = canonical(np.asarray(value))
        return array if array.dtype.kind == "i" else array.astype(np.float32)

    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, keys)): numbers(param.get_value()) for keys, param in flat}


def _shard_by_shard(weight: Quantised) -> np.ndarray:
    """Returns the numbers of a weight on devices: each of them has its own part in the kernel's layout."""
    found = np.full(weight.shape, np.nan, np.float32)
    others = weight.scales if weight.lows is None else weight.lows
    parts = (each.addressable_shards for each in (weight.values, weight.scales, others))
    by_device = [{shard.device: shard for shard in shards} for shards in parts]
    for device, shard in by_device[0].items():
        scales, lows = (np.asarray(each[device].data) for each in by_device[1:])
        own = replace(
            weight, values=np.asarray(shard.data), scales=scales, lows=None if weight.lows is None else lows
        )
        packed = shard.index[-1]
        start, stop, _ = packed.indices(weight.values.shape[-1])
        each = weight.coding.num_packed
        found[(*shard.index[:-1], slice(start * each, stop * each))] = dequantised(own)
    return found


def quantised_paths(model: Decoder) -> set[str]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, k)) for k, p in flat if isinstance(p.get_value(), Quantised)}
