"""The gated MLP of each row's expert: rows are sorted by expert, and group sizes are data.

Axes: N rows, E experts, D model dimension, F inner dimension, 2 gate and up; T tokens, K experts a token; C
padded rows of an expert.
"""

from jmoe_kernels.grouped_mlp.api import COMBINED, Implementation, grouped_mlp, pick, storage_dtype, supports
from jmoe_kernels.grouped_mlp.types import Activation, ExpertWeights, gated

__all__ = [
    "COMBINED", "Activation", "ExpertWeights", "Implementation", "gated", "grouped_mlp", "pick",
    "storage_dtype", "supports",
]  # fmt: skip
