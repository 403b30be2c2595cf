"""The predictors by their names in the config, and how one is made."""

from jmoe.config.techniques import PredictorName
from jmoe.offload.predictors.base import NamedPredictor, PredictorInputs, PredictorSizes
from jmoe.offload.predictors.counts import RequestCounts
from jmoe.offload.predictors.expert_map import ExpertMaps
from jmoe.offload.predictors.next_gate import NextGate
from jmoe.offload.predictors.none import NoPredictor
from jmoe.offload.predictors.token_table import TokenTable
from jmoe.offload.types import Predictor

PREDICTORS: dict[PredictorName, type[NamedPredictor]] = {
    "expert_map": ExpertMaps,
    "next_gate": NextGate,
    "token_table": TokenTable,
    "counts": RequestCounts,
    "none": NoPredictor,
}


def make_predictor(
    name: PredictorName, sizes: PredictorSizes, inputs: PredictorInputs = PredictorInputs()
) -> Predictor:
    """Makes the predictor called ``name``; raises ValueError for another name, for sizes that do not fit and
    for a missing input."""
    if name not in PREDICTORS:
        raise ValueError(f"unknown predictor {name!r}; it can be one of {', '.join(PREDICTORS)}")
    if not 1 <= sizes.distance <= sizes.layers:
        raise ValueError(f"a predictor looks 1 to {sizes.layers} layers ahead, not {sizes.distance}")
    if sizes.store_size < 1:
        raise ValueError(f"a store holds 1 iteration or more, not {sizes.store_size}")
    profile, shape = inputs.profile, (sizes.layers, sizes.experts)
    if profile is not None and profile.loads_LE.shape != shape:
        found, expected = (" x ".join(map(str, each)) for each in (profile.loads_LE.shape, shape))
        raise ValueError(f"the profile has {found} experts, the model {expected}")
    return PREDICTORS[name].from_inputs(sizes, inputs)
