"""The type of quantised weights, and how their numbers are read in portable arithmetic."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from jmoe_kernels.quantised.codes import DTYPES, Code, Scales, nbytes_of, num_packed
from jmoe_kernels.quantised.layouts import LAYOUTS, LayoutName


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
        """Number of codes in one element of a checkpoint's array of values."""
        return num_packed(self.code)

    def num_groups(self, inner: int) -> int:
        """Returns the number of groups of a row of ``inner`` numbers."""
        return 1 if self.group is None else -(-inner // self.group)

    def shapes(
        self, shape: tuple[int, ...], dtype: str = "float32", layout: LayoutName = "rows"
    ) -> "Quantised":
        """Returns a weight of that shape, with a ``ShapeDtypeStruct`` for each array.

        dtype: dtype in which products are computed.
        layout: how the arrays lie in memory.
        Raises ValueError for rows that do not pack into whole bytes.
        """
        *front, inner = shape
        if inner % self.num_packed:
            raise ValueError(f"rows of {inner} numbers do not pack into whole bytes of {self.code}")
        values = jax.ShapeDtypeStruct((*front, inner // self.num_packed), DTYPES[self.code])
        scales = jax.ShapeDtypeStruct((*front, self.num_groups(inner)), np.dtype(self.scales))
        return Quantised(values, scales, scales if self.has_lows else None, self, dtype).in_layout(layout)

    def nbytes(self, shape: tuple[int, ...], layout: LayoutName = "rows") -> int:
        """Returns the bytes of a weight of that shape in a layout."""
        return sum(nbytes_of(a.shape, a.dtype) for a in jax.tree.leaves(self.shapes(shape, layout=layout)))

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
    layout: how the arrays lie in memory; the shapes above are those of "rows", which checkpoints have.
    """

    values: Any
    scales: Any
    lows: Any
    coding: Coding = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})
    layout: LayoutName = field(default="rows", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers."""
        return LAYOUTS[self.layout].shape(self.values.shape, self.coding.code)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def roles(self) -> "Quantised":
        """The weight with the ``Role`` of each array in its place."""
        return replace(self, values="values", scales="scales", lows=None if self.lows is None else "lows")

    def in_layout(self, layout: LayoutName) -> "Quantised":
        """Returns a weight of the layout "rows" in another one. Its arrays are numpy's, which are copied, or
        shapes."""
        record, code = LAYOUTS[layout], self.coding.code
        assert self.layout == "rows", "only the order of checkpoints is packed"
        if layout == "rows":
            return self

        def packed(role: Any, array: Any) -> Any:
            if isinstance(array, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(*record.kept(array.shape, array.dtype, role, code))
            return record.pack(array, role, code, False)

        return replace(jax.tree.map(packed, self.roles, self), layout=layout)

    def __getitem__(self, index: Any) -> "Quantised":
        """Indexes the axes before ``out``, as an array does; ``...`` is the weight itself. In the layout
        "rows" it can index ``out`` too."""
        return jax.tree.map(lambda a: a[index], self)

    def take_rows(self, ids: Array) -> Array:
        """Returns rows of a matrix ``[out, in]`` as floats in the dtype of its products."""
        block = LAYOUTS[self.layout].block
        if block == 1:
            return as_float(self[ids])
        if block is None:
            return as_float(jax.tree.map(lambda a: a[..., ids], self))
        blocks = jax.tree.map(lambda a: a.reshape(-1, block, a.shape[-1])[ids // block], self)
        return jnp.take_along_axis(as_float(blocks), (ids % block)[:, None, None], axis=1)[:, 0]

    def reshape(self, *front: int) -> "Quantised":
        """Returns the weight with other axes before ``in``; raises ValueError in a layout whose last axis is
        ``out``."""
        if LAYOUTS[self.layout].block is None:
            raise ValueError(f"rows of the layout {self.layout!r} are not an axis before the last")
        return jax.tree.map(lambda a: a.reshape(*front, a.shape[-1]), self)

    def split(self, axes: PartitionSpec) -> "Quantised":
        """Returns how each array is split if the weight is split by ``axes``: a scale of a whole row is on
        every rank that has a part of the row."""
        whole = PartitionSpec(*axes, *[None] * (self.ndim - len(axes)))
        of_scales = PartitionSpec(*whole[:-1], None) if self.coding.group is None else whole
        lie = LAYOUTS[self.layout].axes
        scales = lie(of_scales, "scales")
        return replace(
            self, values=lie(whole, "values"), scales=scales, lows=None if self.lows is None else scales
        )


Weight = Array | Quantised


def dequantised(weight: Quantised) -> Any:
    """Returns the numbers in float32, as an array of numpy or jax as the weight's arrays are."""
    xp, coding, inner = weight.values.__array_namespace__(), weight.coding, weight.shape[-1]
    layout = LAYOUTS[weight.layout]

    def spread(per_group: Any) -> Any:
        if coding.group is None or coding.group == 1:
            return per_group
        return xp.repeat(per_group, coding.group, axis=-1)[..., :inner]

    numbers = layout.numbers(weight.values, coding.code) * spread(layout.per_group(weight.scales))
    return numbers if weight.lows is None else numbers + spread(layout.per_group(weight.lows))


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
