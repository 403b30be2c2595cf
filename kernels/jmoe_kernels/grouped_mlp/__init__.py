"""Grouped expert MLP: rows sorted by expert, group sizes as data."""

from jmoe_kernels.grouped_mlp.api import COMBINED, Implementation, grouped_mlp, pick, storage_dtype, supports
from jmoe_kernels.grouped_mlp.types import Activation, ExpertWeights, gated

__all__ = [
    "COMBINED", "Activation", "ExpertWeights", "Implementation", "gated", "grouped_mlp", "pick",
    "storage_dtype", "supports",
]  # fmt: skip
