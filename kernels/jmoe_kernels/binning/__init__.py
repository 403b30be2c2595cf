"""Batch-level binning of a router's choices onto fewer experts (LYNX, arXiv 2411.08982), and their order.

Axes: T tokens, E experts, K experts per token, N = T * K assignments, V rows of the table of votes, B its
bins; in kernels also R a block of experts, 1 an axis of length one. T, E and N there include what pads a
tile.
"""

from jmoe_kernels.backends import BinningKernel
from jmoe_kernels.binning.api import bin_experts, pick, why_not
from jmoe_kernels.binning.implementations import IMPLEMENTATIONS
from jmoe_kernels.binning.reference import cast_votes, choose_active, remap
from jmoe_kernels.binning.types import Binned, BinningNeeds, KernelChoice, Rule

__all__ = [
    "IMPLEMENTATIONS",
    "Binned",
    "BinningKernel",
    "BinningNeeds",
    "KernelChoice",
    "Rule",
    "bin_experts",
    "cast_votes",
    "choose_active",
    "pick",
    "remap",
    "why_not",
]
