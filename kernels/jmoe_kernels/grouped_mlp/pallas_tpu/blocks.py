"""Block sizes of the TPU kernels: a table by chip, dtype and kernel, fitted to a shape and to VMEM."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp

MIB = 1 << 20
LANES = 128  # D and F are multiples of this: chunks are then whole (sublane, lane) tiles, which DMA needs
ROW_ALIGN = 16  # rows of a bfloat16 tile: a dynamic row window starts at a multiple of this
Kernel = Literal["decode", "prefill"]


@dataclass(frozen=True)
class Form:
    """The way in which the numbers of a call are stored, as far as block sizes depend on it.

    name: dtype of the weights, or of their codes.
    bits: bits of a weight, with its share of scales and lows.
    row_bytes: bytes of a number of a row of x, with all its terms.
    terms: numbers that stand for one of x: 2 of eight bits for 16, else 1.
    align: rows of a tile of x: a window starts at a multiple of this.
    group: numbers of F that a chunk must not cut; 1 if there are none.
    """

    name: str
    bits: float
    row_bytes: int
    terms: int = 1
    align: int = ROW_ALIGN
    group: int = 1

    @staticmethod
    def of_dtype(dtype: jnp.dtype) -> "Form":
        """Returns the form of plain weights."""
        return Form(dtype.name, 8 * dtype.itemsize, dtype.itemsize)

    @property
    def is_coded(self) -> bool:
        """Whether the weights are quantised."""
        return self.name not in ("bfloat16", "float32")


@dataclass(frozen=True)
class BlockSizes:
    """The sizes into which one call is cut.

    kernel: name of the kernel.
    inner: columns of F in a chunk of weights (gate, up and down together: ``3 * inner * D`` numbers).
    windows: rows multiplied at once, (large, small): large ones while more rows than a small one are left.
    rows: for decode all rows, rounded up to ``ROW_ALIGN``; for prefill the rows of one block of x and y in
        VMEM.
    buffers: chunks in VMEM, all but one of them in flight, for decode; prefill always has two.
    cores: TensorCores of a device that share the work.
    product: values of a product computed at once, if that is 256 columns or more; a larger one hides more of
        the latency of the matrix unit, takes longer to compile and spills registers.
    vmem_limit: bytes of VMEM that the compiler may use on each core.
    form: how the numbers are stored.
    """

    kernel: Kernel
    inner: int
    windows: tuple[int, int]
    rows: int
    buffers: int = 2
    cores: int = 1
    product: int = 1 << 15
    vmem_limit: int = 32 * MIB
    form: Form = Form("float32", 32, 4)

    def columns(self, window: int, model: int) -> tuple[int, int]:
        """Returns how many columns of gate and of up, and of y, are computed at once for a window of rows."""

        def width(total: int, values: int) -> int:
            most = max(2 * LANES, values // window)
            pieces = -(-total // most)  # as even as whole lanes allow
            return -(-total // pieces // LANES) * LANES

        return width(self.inner, self.product // 2), width(model, self.product)

    def vmem_bytes(self, model: int) -> int:
        """Returns the VMEM that a call needs: rows in and out, weight chunks, values of one large window."""
        item, is_coded = self.form.row_bytes, self.form.is_coded
        x_and_y = self.rows * (model * (item + 4) + is_coded * 4 * LANES)
        chunks = self.buffers * int(3 * self.inner * model * self.form.bits / 8)
        window = max(self.windows) * (2 * self.inner * 4 + self.inner * (4 + item) + 2 * model * 4)
        window += is_coded * max(self.windows) * (self.inner * 4 + 2 * LANES * 4)
        if self.form.name == "int4":  # the compiler keeps the chunk as int8 too, and spills
            window += 3 * self.inner * model + MIB
        return (2 if self.kernel == "prefill" else 1) * x_and_y + chunks + window + MIB


@dataclass(frozen=True)
class Tuning:
    """A row of the table: ``BlockSizes`` before they are fitted to a shape.

    chunk: bytes of weights in a chunk.
    windows: as in ``BlockSizes``.
    product: as in ``BlockSizes``.
    rows: most rows of a block of x and y, for prefill.
    buffers: as in ``BlockSizes``.
    """

    chunk: int
    windows: tuple[int, int]
    product: int
    rows: int = 0
    buffers: int = 2


@dataclass(frozen=True)
class Chip:
    """The limits of one kind of TPU.

    cores: TensorCores of one JAX device.
    vmem: bytes of each core that a kernel may take.
    decode_rows: mean number of rows per expert up to which decode is the faster kernel.
    """

    cores: int
    vmem: int
    decode_rows: int


CHIPS = {
    "TPU v5 lite": Chip(cores=1, vmem=100 * MIB, decode_rows=32),
    "TPU v5": Chip(cores=2, vmem=56 * MIB, decode_rows=32),
    "TPU v6 lite": Chip(cores=1, vmem=100 * MIB, decode_rows=32),
    "default": Chip(cores=1, vmem=32 * MIB, decode_rows=32),
}
CODED: dict[Kernel, Tuning] = {
    "decode": Tuning(3 * MIB, windows=(32, 16), product=1 << 15, buffers=3),
    "prefill": Tuning(6 * MIB, windows=(128, 64), product=1 << 16, rows=512),
}
TABLE: dict[tuple[str, str, Kernel], Tuning] = {
    **{("default", name, kernel): row for name in ("int8", "int4", "e4m3") for kernel, row in CODED.items()},
    ("default", "bfloat16", "decode"): Tuning(3 * MIB, windows=(64, 16), product=1 << 15, buffers=3),
    ("default", "float32", "decode"): Tuning(3 * MIB, windows=(64, 16), product=1 << 15, buffers=3),
    ("default", "bfloat16", "prefill"): Tuning(4 * MIB, windows=(256, 128), product=1 << 17, rows=256),
    ("default", "float32", "prefill"): Tuning(4 * MIB, windows=(256, 128), product=1 << 17, rows=256),
    ("TPU v5 lite", "bfloat16", "prefill"): Tuning(18 * MIB, windows=(256, 128), product=1 << 17, rows=1024),
    ("TPU v5", "bfloat16", "prefill"): Tuning(18 * MIB, windows=(256, 128), product=1 << 17, rows=1024),
    ("TPU v6 lite", "bfloat16", "decode"): Tuning(3 * MIB, windows=(64, 32), product=1 << 16, buffers=4),
    ("TPU v6 lite", "bfloat16", "prefill"): Tuning(18 * MIB, windows=(256, 128), product=1 << 19, rows=1024),
}


def device_kind() -> str:
    """Returns the kind of device that is traced for: the mesh's if there is one, else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def divisor(size: int, most: int, step: int = LANES) -> int:
    """Returns the largest multiple of ``step`` up to ``most`` that divides ``size``, or ``step``."""
    candidates = [n for n in range(step, size + 1, step) if size % n == 0 and n <= max(most, step)]
    return max(candidates, default=step)


def fit_blocks(kernel: Kernel, dims: tuple[int, int, int], rows: int, form: Form, kind: str) -> BlockSizes:
    """Returns the table's blocks for a shape, shrunk until they fit VMEM or cannot shrink any more."""
    _, inner, model = dims
    chip = CHIPS.get(kind, CHIPS["default"])
    key = (kind, form.name, kernel)
    row = TABLE.get(key) or TABLE[("default", form.name, kernel)]
    align, step = form.align, math.lcm(LANES, form.group)
    padded = -(-rows // align) * align
    block = padded if kernel == "decode" else min(row.rows, -(-padded // chip.cores // align) * align)
    blocks = BlockSizes(
        kernel,
        divisor(inner, int(row.chunk * 8 / (3 * model * form.bits)), step),
        (min(row.windows[0], block), min(max(row.windows[1], align), block)),
        block,
        row.buffers,
        chip.cores,
        row.product,
        chip.vmem,
        form,
    )
    while blocks.vmem_bytes(model) > chip.vmem:
        smaller = divisor(inner, blocks.inner - step, step)
        if kernel == "prefill" and blocks.rows > 2 * blocks.windows[0]:
            blocks = replace(blocks, rows=blocks.rows // 2 // align * align)
        elif smaller < blocks.inner:
            blocks = replace(blocks, inner=smaller)
        elif blocks.windows[0] > 64:
            blocks = replace(blocks, windows=(64, min(64, blocks.windows[1])))
        else:
            break
    return blocks


def choose_blocks(dims: tuple[int, int, int], rows: int, form: Form, kind: str | None = None) -> BlockSizes:
    """Returns blocks for ``rows`` rows of experts with ``dims`` = (E, F, D).

    They are those of decode if there are few rows per expert.
    """
    kind = device_kind() if kind is None else kind
    experts, _, model = dims
    chip = CHIPS.get(kind, CHIPS["default"])
    if rows <= chip.decode_rows * experts:
        blocks = fit_blocks("decode", dims, rows, form, kind)
        if blocks.vmem_bytes(model) <= chip.vmem:
            return blocks
    return fit_blocks("prefill", dims, rows, form, kind)
