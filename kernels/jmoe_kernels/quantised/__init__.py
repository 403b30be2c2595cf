"""Quantised weights: one pytree type for every published form, and its portable arithmetic.

A weight ``[..., out, in]`` is stored as codes of one byte or half a byte. ``group`` neighbouring numbers of a
row share a scale, and perhaps a low. A number is ``value of its code * scale + low``. Three kinds of codes
take every format that is read: signed bytes ("int8"), eight-bit floats ("e4m3"), and nibbles that are numbers
from -8 to 7 ("int4") or indexes into a table of sixteen ("e2m1", "iq4").

The arrays keep the weight's leading axes, so one index takes an expert from all of them, and one partition of
the leading axes and of the rows splits all of them. The order of the last axes is the weight's layout
(``layouts``): that of checkpoints, or the one that a kernel reads.
"""

from jmoe_kernels.quantised.codes import (
    DTYPES,
    TABLES,
    Code,
    Scales,
    code_storage,
    exponent_scales,
    nbytes_of,
)
from jmoe_kernels.quantised.layouts import LAYOUTS, Layout, LayoutName, Role
from jmoe_kernels.quantised.weight import (
    Coding,
    Quantised,
    Weight,
    as_float,
    coding_of,
    dequantised,
    dtype_of,
)

__all__ = [
    "DTYPES", "LAYOUTS", "TABLES", "Code", "Coding", "Layout", "LayoutName", "Quantised", "Role", "Scales",
    "Weight", "as_float", "code_storage", "coding_of", "dequantised", "dtype_of",
    "exponent_scales", "nbytes_of",
]  # fmt: skip
