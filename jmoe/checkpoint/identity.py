"""A model's identity: what tells whether a profile or placement was made for it."""

import dataclasses
import hashlib
import json

import ml_dtypes
import numpy as np

from jmoe.checkpoint.params import moe_layers
from jmoe.models.decoder import Decoder
from jmoe.moe.placement import Placement


def model_identity(model: Decoder, placement: Placement | None = None) -> str:
    """``architecture:digest``, of the configuration and of every layer's gate in the checkpoint's order.

    Cheap (gates are a thousandth of a model) and the same for a Hugging Face directory and its conversion, in
    either dtype: gates are rounded to bfloat16 first. placement: what the experts were renumbered by.
    """
    config = dataclasses.asdict(model.cfg)
    del config["dtype"]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for i, layer in enumerate(moe_layers(model.cfg)):
        gate_ED = np.asarray(model.layers[layer].moe.gate_ED[...])
        if placement is not None:
            gate_ED = gate_ED[np.argsort(placement.experts_LP[i])]
        digest.update(np.ascontiguousarray(gate_ED.astype(ml_dtypes.bfloat16)).tobytes())
    return f"{model.cfg.architecture}:{digest.hexdigest()[:16]}"
