"""The methods of quantisation whose checkpoints are read: one row per value of ``quant_method``."""

from jmoe.checkpoint.quantised.methods import auto_round, awq, compressed_tensors, fp8, gptq, modelopt, mxfp4
from jmoe.checkpoint.quantised.methods.method import Method, Rule

METHODS = {
    method.name: method
    for method in (
        auto_round.METHOD,
        auto_round.OLD_METHOD,
        awq.METHOD,
        compressed_tensors.METHOD,
        fp8.METHOD,
        gptq.METHOD,
        modelopt.METHOD,
        mxfp4.METHOD,
    )
}

__all__ = ["METHODS", "Method", "Rule"]
