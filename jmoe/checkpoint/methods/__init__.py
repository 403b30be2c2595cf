"""The methods of quantisation whose checkpoints are read: one row per value of ``quant_method``."""

from jmoe.checkpoint.methods import compressed_tensors, fp8, mxfp4
from jmoe.checkpoint.methods.method import Method, Rule

METHODS = {method.name: method for method in (compressed_tensors.METHOD, fp8.METHOD, mxfp4.METHOD)}

__all__ = ["METHODS", "Method", "Rule"]
