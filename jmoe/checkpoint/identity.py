"""A model's identity: shows whether a profile or placement was made for that model."""

import dataclasses
import hashlib
import json

import ml_dtypes
import numpy as np

from jmoe.models.decoder import Decoder
from jmoe.placement.placement import Placement


def model_identity(model: Decoder, placement: Placement | None = None) -> str:
    """Returns ``architecture:digest``, a digest of the configuration and of all gates in the checkpoint's
    order.

    It is cheap (gates are a thousandth of a model) and the same for a Hugging Face directory and its
    conversion, in either dtype: gates are rounded to bfloat16 first.

    placement: placement by which the experts were renumbered.
    """
    config = dataclasses.asdict(model.cfg)
    del config["dtype"], config["quant_method"], config["rope"]["long"]  # as it is kept and served
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    routers = [layer.moe.router for layer in model.layers if layer.moe is not None]
    for i, router in enumerate(routers):
        gate_ED = np.asarray(router.gate_ED[...])
        if placement is not None:
            gate_ED = gate_ED[np.argsort(placement.experts_LP[i])]
        digest.update(np.ascontiguousarray(gate_ED.astype(ml_dtypes.bfloat16)).tobytes())
    return f"{model.cfg.architecture}:{digest.hexdigest()[:16]}"
