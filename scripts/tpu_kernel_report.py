"""Writes what the TPU compiler says of the grouped-MLP kernels at real layer sizes, without a TPU.

    python scripts/tpu_kernel_report.py --out FILE
    python scripts/tpu_kernel_report.py --only 'v5e/Qwen3*/decode/*'

Each kernel is compiled inside ``shard_map`` on four chips. A row says, for one chunk of an expert's weights,
how many cycles the compiler's schedule needs for a window of rows and how many cycles the DMA of the chunk
takes at the chip's datasheet bandwidth. Cycles above the DMA's: the kernel is compute-bound. Nothing here has
run: DMA latency and contention are not in a schedule. Needs libtpu (``pip install libtpu``).
"""

import argparse
import fnmatch
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import tpu_compiler
from shared.layer_sizes import layer_sizes


@dataclass(frozen=True)
class Chip:
    """A chip.

    topology: slice of four chips.
    clock: clock in Hz, as the peak implies.
    bandwidth: HBM bytes/s of a device.
    peak: bfloat16 flop/s of a device.
    cores: number of cores of a device.
    """

    topology: str
    clock: float
    bandwidth: float
    peak: float
    cores: int = 1


@dataclass(frozen=True)
class Layer:
    """A layer of a model.

    name: model.
    experts: number of experts of the model.
    model: width of the model.
    inner: width inside an expert of the model.
    mesh: (expert, tensor) sizes on four chips.
    """

    name: str
    experts: int
    model: int
    inner: int
    mesh: tuple[int, int]


# how quantised weights are stored, by the name of the row; MXFP4 is multiplied as int8, in groups of 32
CODINGS = {
    "int8": ("int8", None), "int8-g128": ("int8", 128), "int8-g32": ("int8", 32), "int4": ("int4", None),
    "int4-g128": ("int4", 128), "int4-g32": ("int4", 32), "e4m3": ("e4m3", None), "e4m3-g128": ("e4m3", 128),
}  # fmt: skip


def layer_of(name: str, mesh: tuple[int, int] = (4, 1)) -> Layer:
    """Returns the layer of a model, whose shape's file has the model's name."""
    sizes = layer_sizes(name.lower())
    return Layer(name, sizes.experts, sizes.model, sizes.inner, mesh)


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 819e9, 197e12),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 2765e9, 459e12, cores=2),
    "v6e": Chip("v6e:2x2", 1.75e9, 1640e9, 918e12),
}
LAYERS = (
    layer_of("Mixtral-8x7B", mesh=(2, 2)),
    layer_of("Qwen3-30B-A3B"),
    layer_of("OLMoE-1B-7B"),
    layer_of("DeepSeek-V2-Lite"),
    layer_of("DeepSeek-V3", mesh=(4, 1)),
)
DECODE_ROWS, PREFILL_ROWS = 16, 8192  # rows of each expert; rows of a device
COLUMNS = {
    "chip": "chip",
    "layer": "layer, on one device",
    "kernel": "kernel",
    "dtype": "weights",
    "rows": "rows",
    "blocks": "chunk, windows",
    "vmem_mib": "VMEM MiB",
    "spills": "spills small / large",
    "small": "cycles small",
    "large": "cycles large",
    "dma": "cycles DMA",
    "mxu": "MXU large",
    "verdict": "one window a chunk",
    "seconds": "compile s",
}


def compile_layer(chip: Chip, layer: Layer, rows: int, dtype_name: str) -> tuple:
    """Compiles the layer and returns (blocks, weight shape on a device, seconds to compile)."""
    import jax  # after main() has set the environment that libtpu reads
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P
    from jmoe_kernels.grouped_mlp.pallas_tpu import choose_blocks, form_of, grouped_mlp_pallas_tpu
    from jmoe_kernels.grouped_mlp.types import ExpertWeights
    from jmoe_kernels.quantised import Coding

    expert, tensor = layer.mesh
    devices = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices
    mesh = Mesh(np.array(devices[: expert * tensor]).reshape(expert, tensor), ("expert", "tensor"))
    blocks = []

    def body(x_ND, weights, sizes_E):  # type: ignore[no-untyped-def]
        blocks.append((choose_blocks(weights.dims, x_ND.shape[0], form_of(weights)), weights.dims))
        y_ND = grouped_mlp_pallas_tpu(x_ND, weights, sizes_E)
        return jax.lax.psum(y_ND, "tensor") if tensor > 1 else y_ND

    e, d, f = layer.experts, layer.model, layer.inner
    axes, shapes = P("expert", None, "tensor"), ((e, 2, f, d), (e, d, f))
    both: list[Any]
    split: list[Any]
    if dtype_name in CODINGS:
        coding = Coding(*CODINGS[dtype_name])  # pyright: ignore[reportArgumentType]
        both = [coding.shapes(shape, "bfloat16", "columns") for shape in shapes]
        split, dtype = [weight.split(axes) for weight in both], jnp.dtype(jnp.bfloat16)
    else:
        dtype = jnp.dtype(dtype_name)
        both, split = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes], [axes, axes]
    specs = P("expert"), ExpertWeights(split[0], split[1]), P("expert")
    of_rows = jax.ShapeDtypeStruct((expert * rows, d), dtype)
    shapes = of_rows, ExpertWeights(both[0], both[1]), jax.ShapeDtypeStruct((e,), jnp.int32)
    arguments = jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        specs,
    )
    mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("expert"), check_vma=False)
    lowered = jax.jit(mapped).lower(*arguments)
    start = time.perf_counter()
    lowered.compile()
    return *blocks[0], time.perf_counter() - start


def windows(kernel: tpu_compiler.Kernel, blocks, dims: tuple[int, int, int]) -> dict[str, int]:
    """Returns the cycles of a chunk for its first window and for a large window.

    The first window is small; its cycles include what a chunk costs in any case.
    """
    step = max(kernel.body.inner, key=lambda loop: loop.cycles)
    # before the large windows are short loops: prefill zeroes a block of y, decode copies scales in VMEM
    large = max(step.inner, key=lambda loop: loop.cycles)
    before = step.inner.index(large)

    def trips(window: int) -> list[int]:
        up, down = blocks.columns(window, dims[2])
        tiles = [window // blocks.form.align] if blocks.form.is_coded else []  # of h, which is split
        return [n for n in (blocks.inner // up, *tiles, dims[2] // down) if n > 1]

    small_trips = trips(blocks.windows[1])
    return {
        "large": large.total(trips(blocks.windows[0])),
        "small": step.total([1] * before + [0] + small_trips),
        "large_spills": large.spills,
        "small_spills": step.spills - large.spills,
    }


def jobs(patterns: list[str]) -> Iterator[tuple[str, Layer, str, str]]:
    """Yields (chip, layer, kernel, dtype) of every row whose name matches one of ``patterns``."""
    for job in itertools.product(CHIPS, LAYERS, ("decode", "prefill"), ("bfloat16", "float32", *CODINGS)):
        chip, layer, kernel, dtype = job
        if any(fnmatch.fnmatch(f"{chip}/{layer.name}/{kernel}/{dtype}", p) for p in patterns):
            yield job


def row_of_report(name: str, layer: Layer, kernel: str, dtype: str, dump: Path) -> dict:
    """Compiles one kernel with dumps to ``dump``, and measures its schedule."""
    chip = CHIPS[name]
    shutil.rmtree(dump, ignore_errors=True)
    dump.mkdir()
    rows = DECODE_ROWS * (layer.experts // layer.mesh[0]) if kernel == "decode" else PREFILL_ROWS
    blocks, dims, seconds = compile_layer(chip, layer, rows, dtype)
    static = tpu_compiler.read_kernel(dump, f"grouped_mlp_{blocks.kernel}")
    cycles = windows(static, blocks, dims)
    numbers = 3 * blocks.inner * layer.model
    dma = numbers * blocks.form.bits / 8 / (chip.bandwidth / chip.cores) * chip.clock
    ideal = 2 * numbers * blocks.windows[0] / (chip.peak / chip.cores) * chip.clock
    return {
        "chip": name,
        "layer": f"{layer.name} {dims[0]} x {dims[2]} x {dims[1]}",
        "kernel": blocks.kernel,
        "dtype": dtype,
        "rows": rows,
        "blocks": f"{blocks.inner}, {blocks.windows[0]}/{blocks.windows[1]}",
        "vmem": static.vmem,
        "vmem_limit": blocks.vmem_limit,
        "vmem_estimate": blocks.vmem_bytes(layer.model),
        "vmem_mib": round(static.vmem / 2**20, 1),
        "spills": f"{cycles['small_spills']} / {cycles['large_spills']}",
        **cycles,
        "dma": round(dma),
        "mxu": round(ideal / cycles["large"], 2),
        "verdict": "DMA-bound" if max(cycles["small"], cycles["large"]) < dma else "compute-bound",
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Parses the arguments, sets libtpu's environment, and prints or writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*/bfloat16"],
        help="patterns of chip/layer/kernel/dtype (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, to standard output")
    parser.add_argument("--out", type=Path, help="the file for the markdown table (default: standard output)")
    args = parser.parse_args()
    if (reason := tpu_compiler.why_not()) is not None:
        raise SystemExit(reason)
    lines = [" | ".join(["", *COLUMNS.values(), ""]).strip(), "|" + "---|" * len(COLUMNS)]
    with tempfile.TemporaryDirectory() as scratch:
        dump = Path(scratch) / "dump"
        os.environ.update(tpu_compiler.environment(dump))
        for job in jobs(args.only):
            row = row_of_report(*job, dump)
            lines.append(" | ".join(["", *(str(row[key]) for key in COLUMNS), ""]).strip())
            print(json.dumps(row) if args.json else lines[-1], flush=True)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
