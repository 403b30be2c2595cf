"""The gated MLP of each row's expert: rows are sorted by expert, and group sizes are data.

Axes: N rows, E experts, D model dimension, F inner dimension, 2 gate and up; T tokens, K experts per token;
C padded rows of an expert.
"""

from jmoe_kernels.backends import ExpertKernel
from jmoe_kernels.grouped_mlp.api import PLAIN, grouped_mlp, pick, storage_dtype, why_not, why_not_weights
from jmoe_kernels.grouped_mlp.implementations import IMPLEMENTATIONS
from jmoe_kernels.grouped_mlp.types import ExpertCodings, ExpertWeights, gated
from jmoe_kernels.settings import Activation

__all__ = [
    "IMPLEMENTATIONS", "PLAIN", "Activation", "ExpertCodings", "ExpertKernel", "ExpertWeights", "gated",
    "grouped_mlp", "pick", "storage_dtype", "why_not", "why_not_weights",
]  # fmt: skip
