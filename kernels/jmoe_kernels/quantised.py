"""Quantised weights: one pytree type for every published form, and its portable arithmetic.

A weight ``[..., out, in]`` is stored as codes of one byte or half a byte. ``group`` neighbouring numbers of a
row share a scale, and perhaps a low. A number is ``value of its code * scale + low``. Three kinds of codes
take every format that is read: signed bytes ("int8"), eight-bit floats ("e4m3"), and nibbles that are numbers
from -8 to 7 ("int4") or indexes into a table of sixteen ("e2m1", "iq4").

The arrays keep the weight's leading axes, so one index takes an expert from all of them, and one partition of
the leading axes and of ``out`` splits all of them.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from jmoe_kernels.interleave import BLOCK, Layout, Part, rows_of

Code = Literal["int8", "e4m3", "int4", "e2m1", "iq4"]
Scales = Literal["float32", "bfloat16", "float16", "uint8"]

# the numbers of a nibble: of OCP's E2M1 (Microscaling formats v1.0), and of ggml's IQ4_NL and IQ4_XS
TABLES: dict[Code, tuple[float, ...]] = {
    "int4": tuple(float(n - 8) for n in range(16)),
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}
DTYPES: dict[Code, np.dtype] = {
    "int8": np.dtype(np.int8),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    **dict.fromkeys(TABLES, np.dtype(np.uint8)),
}


@dataclass(frozen=True)
class Coding:
    """The way in which the numbers of a weight are stored.

    code: kind of the codes.
    group: numbers of a row that share a scale, the last group may be shorter; None is the whole row.
    scales: dtype of the scales and lows; "uint8" is E8M0, whose byte b means 2^(b - 127).
    has_lows: whether a low is added to the numbers of each group.
    """

    code: Code
    group: int | None
    scales: Scales = "float32"
    has_lows: bool = False

    def __post_init__(self) -> None:
        if self.has_lows and self.scales == "uint8":
            raise ValueError("lows need floating-point scales")

    def __str__(self) -> str:
        group = "one scale a row" if self.group is None else f"groups of {self.group}"
        return f"{self.code}, {group}" + (" with lows" if self.has_lows else "")

    @property
    def num_packed(self) -> int:
        """Number of codes in one element of the array of values."""
        return 2 if self.code in TABLES else 1

    @property
    def parts(self) -> "Quantised":
        """Returns what each array of a weight is to ``interleave``."""
        values: Part = "bytes" if self.num_packed == 1 else "nibbles"
        return Quantised(values, "scales", "scales" if self.has_lows else None, self, "float32")

    def can_interleave(self, shape: tuple[int, ...]) -> bool:
        """Returns whether a weight of that shape fits the layout "n16": in whole blocks and steps."""
        return len(shape) > 1 and shape[-2] % BLOCK == 0 and shape[-1] % (4 * self.num_packed) == 0

    def num_groups(self, inner: int) -> int:
        """Returns the number of groups of a row of ``inner`` numbers."""
        return 1 if self.group is None else -(-inner // self.group)

    def shapes(self, shape: tuple[int, ...], dtype: str = "float32") -> "Quantised":
        """Returns a weight of that shape, with a ``ShapeDtypeStruct`` for each array.

        dtype: dtype in which products are computed.
        Raises ValueError for rows that do not pack into whole bytes.
        """
        *front, inner = shape
        if inner % self.num_packed:
            raise ValueError(f"rows of {inner} numbers do not pack into whole bytes of {self.code}")
        values = jax.ShapeDtypeStruct((*front, inner // self.num_packed), DTYPES[self.code])
        scales = jax.ShapeDtypeStruct((*front, self.num_groups(inner)), np.dtype(self.scales))
        return Quantised(values, scales, scales if self.has_lows else None, self, dtype)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Returns the bytes of a weight of that shape."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self.shapes(shape)))

    def split(self, inner: int, parts: int) -> "Coding":
        """Returns the coding of the same numbers if rows of ``inner`` are cut into equal parts.

        A group that a part would cut becomes smaller groups with equal scales, which is exact. It raises
        ValueError if a part would cut a byte.
        """
        if parts == 1 or self.group is None:
            return self
        group = math.gcd(self.group, inner // parts)
        if group % self.num_packed:
            raise ValueError(f"{parts} parts of rows of {inner} numbers cut a byte of {self.code}")
        return replace(self, group=group)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """A quantised weight ``[..., out, in]``. Its fields may hold anything else per array: shapes, partitions.

    values: codes ``[..., out, in]``, or ``[..., out, in / 2]`` with the first of two nibbles in the low bits;
        "e4m3" may be stored as uint8 (see ``code_storage``).
    scales: scales ``[..., out, groups]``.
    lows: lows, shaped as the scales; None adds nothing.
    coding: how numbers are stored.
    dtype: name of the dtype in which products with the weight are computed.
    layout: order of the numbers within sixteen rows: that of a checkpoint, or that of ``interleave``.
    """

    values: Any
    scales: Any
    lows: Any
    coding: Coding = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})
    layout: Layout = field(default="rows", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers."""
        *front, packed = self.values.shape
        return (*front, packed * self.coding.num_packed)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    def __getitem__(self, index: Any) -> "Quantised":
        """Indexes the axes before ``out``, as an array does; ``...`` is the weight itself. In the layout
        "rows" it can index ``out`` too."""
        return jax.tree.map(lambda a: a[index], self)

    def take_rows(self, ids: Array) -> Array:
        """Returns rows of a matrix ``[out, in]`` as floats in the dtype of its products."""
        if self.layout == "rows":
            return as_float(self[ids])
        blocks = jax.tree.map(lambda a: a.reshape(-1, BLOCK, a.shape[-1])[ids // BLOCK], self)
        return jnp.take_along_axis(as_float(blocks), (ids % BLOCK)[:, None, None], axis=1)[:, 0]

    def reshape(self, *front: int) -> "Quantised":
        """Returns the weight with other axes before ``in``."""
        return jax.tree.map(lambda a: a.reshape(*front, a.shape[-1]), self)

    def split(self, axes: PartitionSpec) -> "Quantised":
        """Returns how each array is split if the weight is split by ``axes``: a scale of a whole row is on
        every rank that has a part of the row."""
        ends_whole = self.coding.group is None and len(axes) == self.ndim
        of_scales = PartitionSpec(*axes[:-1], None) if ends_whole else axes
        return replace(self, values=axes, scales=of_scales, lows=None if self.lows is None else of_scales)


Weight = Array | Quantised


def code_storage(code: Code, platform: str) -> np.dtype:
    """Returns the dtype that stores codes on a platform: a CPU keeps "e4m3" as bytes, because XLA:CPU
    converts a whole stack to read one expert of it."""
    return np.dtype(np.uint8) if code == "e4m3" and platform == "cpu" else DTYPES[code]


def dequantised(weight: Quantised) -> Any:
    """Returns the numbers in float32, as an array of numpy or jax as the weight's arrays are."""
    if weight.layout == "n16":
        parts = replace(weight.coding.parts, dtype=weight.dtype, layout=weight.layout)
        weight = replace(jax.tree.map(lambda part, array: rows_of(array, part), parts, weight), layout="rows")
    xp, coding, inner = weight.values.__array_namespace__(), weight.coding, weight.shape[-1]

    def spread(per_group: Any) -> Any:
        if coding.group is None or coding.group == 1:
            return per_group
        return xp.repeat(per_group, coding.group, axis=-1)[..., :inner]

    numbers = _numbers(weight) * spread(_scales(weight.scales))
    return numbers if weight.lows is None else numbers + spread(weight.lows.astype(np.float32))


def as_float(weight: Weight) -> Array:
    """Returns a weight as a float array in the dtype of its products; uint16 (see ``storage_dtype``) is read
    as bfloat16."""
    if isinstance(weight, Quantised):
        return dequantised(weight).astype(weight.dtype)
    return lax.bitcast_convert_type(weight, jnp.bfloat16) if weight.dtype == jnp.uint16 else weight


def coding_of(weight: Weight) -> Coding | None:
    """Returns how a weight is stored, or None if it is not quantised."""
    return weight.coding if isinstance(weight, Quantised) else None


def dtype_of(weight: Weight) -> jnp.dtype:
    """Returns the dtype of ``as_float(weight)``."""
    return jnp.dtype(jnp.bfloat16 if weight.dtype == jnp.uint16 else weight.dtype)


def _numbers(weight: Quantised) -> Any:
    """Returns the numbers of the codes, before any scale, in float32."""
    values, coding = weight.values, weight.coding
    if coding.code in TABLES:
        xp = values.__array_namespace__()
        nibbles = xp.stack([values & 15, values >> 4], axis=-1).reshape(weight.shape)
        if coding.code == "int4":
            return nibbles.astype(np.float32) - np.float32(8)
        table = xp.asarray(TABLES[coding.code], dtype=np.float32)
        return xp.take(table, nibbles.astype(np.int32), mode="clip")
    if coding.code == "e4m3":
        values = _bitcast(values, DTYPES["e4m3"])
    return values.astype(np.float32)


def _scales(scales: Any) -> Any:
    """Returns scales in float32."""
    return exponent_scales(scales) if scales.dtype == np.uint8 else scales.astype(np.float32)


def exponent_scales(scales: Any) -> Any:
    """Returns E8M0 scales in float32: a byte b is 2^(b - 127)."""
    xp = scales.__array_namespace__()
    bits = xp.where(scales == 0, xp.asarray(1 << 22, dtype=np.int32), scales.astype(np.int32) << 23)
    return _bitcast(bits, np.dtype(np.float32))


def _bitcast(array: Any, dtype: np.dtype) -> Any:
    return array.view(dtype) if isinstance(array, np.ndarray) else lax.bitcast_convert_type(array, dtype)
