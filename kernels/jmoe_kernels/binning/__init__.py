"""Batch-level binning of a router's choices onto fewer experts (LYNX), and its order by expert."""

from jmoe_kernels.binning.api import Implementation, bin_experts, pick, supports
from jmoe_kernels.binning.reference import cast_votes, choose_active, remap, route_softmax
from jmoe_kernels.binning.types import Binned, Method, Rule

__all__ = [
    "Binned",
    "Implementation",
    "Method",
    "Rule",
    "bin_experts",
    "cast_votes",
    "choose_active",
    "pick",
    "remap",
    "route_softmax",
    "supports",
]
