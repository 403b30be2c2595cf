"""Tests the grouped MLP for TPUs in Pallas' interpreters: numbers against numpy, reads, races, refusals."""

import dataclasses
import re
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jmoe_kernels.grouped_mlp.cases import Case, empty_patterns, make_inputs
from jmoe_kernels.grouped_mlp.pallas_tpu import BlockSizes, choose_blocks, grouped_mlp_pallas_tpu, limit
from jmoe_kernels.grouped_mlp.pallas_tpu.blocks import CHIPS, ROW_ALIGN, Form
from jmoe_kernels.grouped_mlp.pallas_tpu.prefill import make_tiles
from jmoe_kernels.grouped_mlp.types import ExpertWeights
from jmoe_kernels.settings import Activation

ROWS, MODEL, INNER = 112, 128, 256
SIZES = {
    "even": (28, 28, 28, 28),
    "one row each": (1, 1, 1, 1),
    "one hot group": (3, 100, 2, 1),
    "all rows in the first": (112, 0, 0, 0),
    "all rows in the last": (0, 0, 0, 112),
    "no rows at all": (0, 0, 0, 0),
    "rows past the last group": (3, 0, 17, 5),
    "groups end on tile edges": (16, 32, 64, 0),
    "groups end one past tile edges": (17, 33, 61, 1),
}
# two chunks of F where a chunk is 128 wide; windows and blocks that groups straddle
BLOCKS = {
    "decode": BlockSizes("decode", 128, (48, 16), ROWS, buffers=3),
    "decode on two cores": BlockSizes("decode", 128, (32, 16), ROWS, buffers=2, cores=2),
    "prefill": BlockSizes("prefill", 128, (32, 16), 48),
    "prefill on two cores": BlockSizes("prefill", 256, (48, 32), 48, cores=2),
}
KERNELS = ("decode", "prefill")
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.06}


def act(name: Activation, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if name == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if name == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if name == "relu":
        return np.maximum(gate, 0) * up
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


def by_numpy(x, gate_up, down, sizes, gate_up_bias=None, down_bias=None, activation="silu"):
    """Runs each expert's rows, one expert after another, in float32."""
    y, start = np.zeros_like(x), 0
    for e, n in enumerate(sizes):
        rows = x[start : start + n]
        gate, up = (
            rows @ gate_up[e, i].T + (0 if gate_up_bias is None else gate_up_bias[e, i]) for i in (0, 1)
        )
        y[start : start + n] = act(activation, gate, up) @ down[e].T + (
            0 if down_bias is None else down_bias[e]
        )
        start += n
    return y


def inputs(sizes: tuple[int, ...], rows: int = ROWS, model: int = MODEL, inner: int = INNER) -> tuple:
    return make_inputs(Case("tpu", rows, sizes, model, inner))


def rounded(a: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)


@partial(jax.jit, static_argnames=("blocks", "activation", "interpret", "dtype"))
def run(
    x, gate_up, down, sizes, *biases, blocks=None, activation="silu", interpret=True, dtype="float32"
) -> jax.Array:
    weights = ExpertWeights(gate_up.astype(dtype), down.astype(dtype), *biases)
    return grouped_mlp_pallas_tpu(
        x, weights, sizes, blocks=blocks, activation=activation, interpret=interpret
    )


def check(y: jax.Array, want: np.ndarray, used: int, dtype: str = "float32") -> None:
    y = np.asarray(y)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y[:used], want[:used], atol=TOLERANCE[dtype])
    assert not np.any(y[used:]), "rows past the last group are exactly zero"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_named_group_sizes(blocks: str, dtype: str):
    for name, sizes in SIZES.items():
        x, gate_up, down, group_sizes = inputs(sizes)
        x[sum(sizes) :] = np.nan, np.inf, -np.inf, *[1] * (MODEL - 3)  # never used
        want = by_numpy(
            *((x, gate_up, down) if dtype == "float32" else map(rounded, (x, gate_up, down))), sizes
        )
        y = run(x, gate_up, down, group_sizes, blocks=BLOCKS[blocks], dtype=dtype)
        try:
            check(y, want, sum(sizes), dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("blocks", BLOCKS)
def test_arbitrary_group_sizes(blocks: str):
    rng = np.random.default_rng(1)
    for _ in range(8):
        cuts = np.sort(rng.integers(0, ROWS + 1, 4))
        sizes = tuple(int(n) for n in np.diff(cuts, prepend=0))
        x, gate_up, down, group_sizes = inputs(sizes)
        check(
            run(x, gate_up, down, group_sizes, blocks=BLOCKS[blocks]),
            by_numpy(x, gate_up, down, sizes),
            cuts[-1],
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_pattern_of_empty_groups(kernel: str):
    rows = 64
    blocks = BlockSizes(kernel, 128, (32, 16), rows if kernel == "decode" else 32)
    x, gate_up, down, _ = inputs((0,) * 8, rows, 128, 128)
    for sizes in empty_patterns(experts=8, rows_each=4):
        y = run(x, gate_up, down, np.asarray(sizes, np.int32), blocks=blocks)
        check(y, by_numpy(x, gate_up, down, sizes), sum(sizes))


@pytest.mark.parametrize(
    ("rows", "sizes", "model", "inner"),
    [(1, (1,), 128, 128), (33, (0, 33), 128, 384), (300, (1, 290, 9), 256, 128), (0, (0, 0), 128, 128)],
)
def test_blocks_of_the_table(rows: int, sizes: tuple[int, ...], model: int, inner: int):
    x, gate_up, down, group_sizes = inputs(sizes, rows, model, inner)
    check(run(x, gate_up, down, group_sizes), by_numpy(x, gate_up, down, sizes), rows)


@pytest.mark.parametrize(
    ("kernel", "activation"),
    [*(("decode", name) for name in get_args(Activation)), ("prefill", "swiglu_oai")],
)
def test_activations_with_biases(kernel: str, activation: Activation):
    sizes = (5, 0, 30, 9)
    x, gate_up, down, group_sizes = inputs(sizes, 48, 128)
    rng = np.random.default_rng(2)
    biases = rng.standard_normal((4, 2, INNER), np.float32) * 4, rng.standard_normal((4, 128), np.float32)
    blocks = dataclasses.replace(BLOCKS[kernel], rows=48)
    y = run(x, gate_up, down, group_sizes, *biases, blocks=blocks, activation=activation)
    want = by_numpy(x, gate_up, down, sizes, *biases, activation)
    np.testing.assert_allclose(y, np.where(np.arange(48)[:, None] < 44, want, 0), atol=2e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_columns_in_a_loop_and_a_remainder(kernel: str):
    sizes = (5, 0, 30, 9)
    x, gate_up, down, group_sizes = inputs(sizes, 48, 640, 640)
    blocks = BlockSizes(kernel, 640, (32, 16), 48, product=1)
    assert blocks.columns(32, 640) == (256, 256), "twice 256 in a loop, then 128"
    check(run(x, gate_up, down, group_sizes, blocks=blocks), by_numpy(x, gate_up, down, sizes), 44)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_stays_in_its_row(bad: float, kernel: str):
    sizes = (20, 0, 37, 12)
    x, gate_up, down, group_sizes = inputs(sizes)
    want = by_numpy(x, gate_up, down, sizes)
    rows = [0, 19, 20, 40, 68]  # also where two groups share a window
    x[rows, 5] = bad
    y = np.asarray(run(x, gate_up, down, group_sizes, blocks=BLOCKS[kernel]))
    assert not np.isfinite(y[rows]).any(axis=1).any()
    others = np.delete(np.arange(ROWS), rows)
    check(y[others], want[others], sum(sizes) - len(rows))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_weights_of_experts_without_rows_are_never_used(blocks: str):
    sizes = (0, 40, 0, 50)
    x, gate_up, down, group_sizes = inputs(sizes)
    want = by_numpy(x, gate_up, down, sizes)
    gate_up[[0, 2]] = down[[0, 2]] = np.nan
    check(run(x, gate_up, down, group_sizes, blocks=BLOCKS[blocks]), want, 90)


@pytest.mark.parametrize("sizes", [(0, 0, 0, 0), (1, 100, 0, 8)])
def test_decode_reads_each_active_expert_once(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    moved: list[int] = []
    copy = pltpu.make_async_copy

    class Counted:
        def __init__(self, source, target, semaphore):
            self.copy, self.bytes = copy(source, target, semaphore), target.size * target.dtype.itemsize

        def start(self):
            jax.debug.callback(lambda: moved.append(self.bytes))
            self.copy.start()

        def wait(self):
            self.copy.wait()

    monkeypatch.setattr(pltpu, "make_async_copy", Counted)
    x, gate_up, down, group_sizes = inputs(sizes)
    weights = ExpertWeights(jnp.asarray(gate_up), jnp.asarray(down))
    y = grouped_mlp_pallas_tpu(
        jnp.asarray(x), weights, jnp.asarray(group_sizes), interpret=True, blocks=BLOCKS["decode"]
    )
    jax.block_until_ready(y)
    jax.effects_barrier()
    of_rows = 2 * ROWS * MODEL * 4
    assert sum(moved) - of_rows == np.count_nonzero(sizes) * 3 * MODEL * INNER * 4


@pytest.mark.parametrize("cores", [1, 2])
def test_prefill_reads_an_expert_once_for_the_blocks_that_it_reaches(cores: int):
    rows, block = 4096, 512
    tiles_of = jax.jit(make_tiles, static_argnums=(1, 2, 3))
    for seed in range(30):
        sizes = np.random.default_rng(seed).multinomial(rows - 100 * seed, np.ones(16) / 16)
        sizes[seed % 16 :: 5] = 0
        tiles = tiles_of(jnp.asarray(sizes, jnp.int32), rows, block, cores)
        expert_T, bounds = np.asarray(tiles.expert_T), np.asarray(tiles.bounds_C)
        run_T = np.arange(bounds[-1])
        block_T = run_T + np.asarray(tiles.offset_E)[expert_T[run_T]]
        assert np.all(sizes[expert_T[run_T]] > 0), "a tile names an expert with rows"
        assert set(block_T) == set(range(rows // block)), "every block is written"
        assert bounds[-1] <= len(expert_T)
        for core in range(cores):
            mine = block_T[bounds[core] : bounds[core + 1]]
            assert np.all(np.diff(mine) >= 0)
            assert set(mine) == set(range(8 // cores * core, 8 // cores * (core + 1)))
            fetched = np.count_nonzero(np.diff(expert_T[bounds[core] : bounds[core + 1]])) + 1
            assert fetched <= np.count_nonzero(sizes)
        ends = np.cumsum(sizes)
        reached = np.where(sizes > 0, (ends - 1) // block - (ends - sizes) // block + 1, 0)
        unused = rows // block - -(-sizes.sum() // block)
        assert bounds[-1] == reached.sum() + unused, "one tile for each expert and block that meet"


def races_found() -> bool:
    """Returns whether the last run under ``detect_races`` found any; jax has no public name for this."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


@pytest.mark.parametrize("blocks", BLOCKS)
def test_no_race_and_no_uninitialized_memory(blocks: str):
    params = pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        dma_execution_mode="on_wait",
        num_cores_or_threads=BLOCKS[blocks].cores,
    )
    sizes = (17, 0, 50, 9)
    x, gate_up, down, group_sizes = inputs(sizes)
    y = run(x, gate_up, down, group_sizes, blocks=BLOCKS[blocks], interpret=params)
    check(y, by_numpy(x, gate_up, down, sizes), sum(sizes))
    assert not races_found()


@pytest.mark.parametrize("kernel", KERNELS)
def test_experts_split_over_devices(kernel: str):
    sizes = (10, 3, 0, 40)
    x, gate_up, down, group_sizes = inputs(sizes)
    mesh = Mesh(np.array(jax.devices()[:2]), ("expert",))
    # a device's rows stand first in its own copy of the rows
    x_of = np.stack([x, np.roll(x, -13, axis=0)])
    blocks = BLOCKS[kernel]

    def body(x, gate_up, down, sizes):
        weights = ExpertWeights(gate_up, down)
        return grouped_mlp_pallas_tpu(x[0], weights, sizes, blocks=blocks, interpret=True)[None]

    f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False))
    y = np.asarray(f(x_of, gate_up, down, group_sizes))
    want = by_numpy(x, gate_up, down, sizes)
    check(y[0], want, 13)
    check(y[1], np.roll(want, -13, axis=0), 40)


def test_bfloat16_stored_as_uint16_is_read_as_bfloat16():
    x, gate_up, down, sizes = inputs((9, 7), 16, 128, 128)
    stored = [jnp.asarray(w, jnp.bfloat16).view(jnp.uint16) for w in (gate_up, down)]
    y = grouped_mlp_pallas_tpu(jnp.asarray(x), ExpertWeights(*stored), jnp.asarray(sizes), interpret=True)
    check(y, by_numpy(*map(rounded, (x, gate_up, down)), sizes), 16, "bfloat16")


def shapes(experts: int, model: int, inner: int, dtype="bfloat16", down_dtype=None) -> ExpertWeights:
    return ExpertWeights(
        jax.ShapeDtypeStruct((experts, 2, inner, model), dtype),
        jax.ShapeDtypeStruct((experts, model, inner), down_dtype or dtype),
    )


@pytest.mark.parametrize(
    ("weights", "activation", "blocks", "reason"),
    [
        (shapes(4, 192, 128), "silu", None, "model dimension 192 is not a multiple of 128"),
        (shapes(4, 128, 2880), "silu", None, "inner dimension 2880 is not a multiple of 128"),
        (shapes(4, 128, 128, "int8"), "silu", None, "weights are int8"),
        (shapes(4, 128, 128, down_dtype="float32"), "silu", None, "gate_up is bfloat16 and down float32"),
        (shapes(4, 128, 128), "tanh", None, "'tanh' is unknown; known: silu, gelu_tanh"),
        (
            shapes(4, 128, 384),
            "silu",
            BlockSizes("prefill", 256, (16, 16), 16),
            "256 is not a multiple of 128 that",
        ),
        (shapes(4, 128, 128), "silu", BlockSizes("decode", 128, (16, 16), 16), "less than the 64 rows"),
        (
            shapes(4, 1 << 17, 128),
            "silu",
            None,
            r"\d+ bytes of VMEM are needed and 33554432 allowed on 'cpu'",
        ),
    ],
)
def test_refusals_name_the_limit(weights, activation, blocks: BlockSizes | None, reason: str):
    assert re.search(reason, limit(weights, 64, activation, blocks) or "")
    x = jax.ShapeDtypeStruct((64, weights.dims[2]), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(
            lambda x, s: grouped_mlp_pallas_tpu(x, weights, s, activation=activation, blocks=blocks), x, sizes
        )


@pytest.mark.parametrize("kind", CHIPS)
def test_blocks_fit_the_chip_at_real_sizes(kind: str):
    layers = [(8, 14336, 4096), (8, 1792, 4096), (128, 768, 2048), (64, 1024, 2048), (64, 1408, 2048)]
    for dims in layers:
        for rows in (1, 16, 100, 1024, 8192, 65536):
            for dtype in map(jnp.dtype, ("bfloat16", "float32")):
                blocks = choose_blocks(dims, rows, Form.of_dtype(dtype), kind)
                assert blocks.vmem_bytes(dims[2]) <= CHIPS[kind].vmem
                assert dims[1] % blocks.inner == 0 and blocks.rows % ROW_ALIGN == 0
                assert max(blocks.windows) <= blocks.rows and all(w % ROW_ALIGN == 0 for w in blocks.windows)
                assert blocks.kernel == "prefill" or rows <= min(
                    CHIPS[kind].decode_rows * dims[0], blocks.rows
                )
                assert blocks.kernel == "decode" or rows > 16 * dims[0]
