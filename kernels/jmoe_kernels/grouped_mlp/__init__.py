"""Grouped expert MLP: rows sorted by expert, group sizes as data."""

from jmoe_kernels.grouped_mlp.api import Implementation, grouped_mlp, storage_dtype, supports

__all__ = ["Implementation", "grouped_mlp", "storage_dtype", "supports"]
