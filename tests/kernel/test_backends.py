"""Tests the record of each platform: its names exist, and its order of preference is followed everywhere."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jmoe_kernels import binning, cpu, grouped_mlp, matmul, paged_attention, rotation
from jmoe_kernels.backends import (
    BACKENDS,
    AttentionKernel,
    Backend,
    BinningKernel,
    ExpertKernel,
    RotationKernel,
    first_supported,
    get_backend,
    home_of,
)
from jmoe_kernels.binning import BinningNeeds, Rule
from jmoe_kernels.choice import choose_kernels
from jmoe_kernels.lazy import LazyFunction
from jmoe_kernels.matmul import DenseKernel
from jmoe_kernels.paged_attention import Heads, Span

from jmoe.config.techniques import OffloadConfig
from jmoe.engine.deployment.room import device_room
from jmoe.engine.offload.build import has_parallel_copies, pick_executor
from jmoe.moe.transport import emulated_ragged_all_to_all, get_exchange

RULE = Rule("affinity", 8, bin_width=0.5, k0=3, keep=0.5)
TABLES = {
    ExpertKernel: grouped_mlp.IMPLEMENTATIONS,
    AttentionKernel: paged_attention.IMPLEMENTATIONS,
    BinningKernel: binning.IMPLEMENTATIONS,
}
PLATFORMS = ["cpu", "gpu", "tpu"]


def mesh_on(platform: str) -> SimpleNamespace:
    """Returns what a mesh of one device of that platform says of itself."""
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]), shape={"expert": 1})


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_record_names_only_what_there_is_and_what_runs_there(platform: str):
    backend, heads = BACKENDS[platform], Heads(8, 2, 128)
    assert backend.name == platform and backend.dense in get_args(DenseKernel)
    for names, known in zip((backend.experts, backend.attention, backend.binning), TABLES, strict=True):
        assert set(names) <= set(get_args(known)) and len(set(names)) == len(names) and names[-1] == "xla"
    reasons = [
        *(grouped_mlp.why_not(name, platform, "bfloat16") for name in backend.experts),
        *(paged_attention.why_not(name, platform, "bfloat16", heads) for name in backend.attention),
        *(binning.why_not(name, platform, 128, RULE) for name in backend.binning),
    ]
    assert not [reason for reason in reasons if reason and "cannot run here" not in reason]


@pytest.mark.parametrize("names", TABLES, ids=["experts", "attention", "binning"])
def test_every_implementation_has_a_record_whose_functions_exist(names):
    assert tuple(TABLES[names]) == get_args(names)
    for record in TABLES[names].values():
        functions = [value for value in vars(record).values() if isinstance(value, LazyFunction)]
        assert all(callable(function.load()) for function in functions)


def test_every_dense_kernel_and_rotation_has_an_entry():
    assert tuple(matmul.IMPLEMENTATIONS) == get_args(DenseKernel)
    assert tuple(rotation.IMPLEMENTATIONS) == get_args(RotationKernel)


def test_every_kernel_has_one_home_and_is_refused_elsewhere():
    homes = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "pallas_tpu": "tpu", "pallas_gpu": "gpu"}
    portable = {"xla", "batched", "reference"}
    named = {*get_args(ExpertKernel), *get_args(AttentionKernel)}
    assert named == homes.keys() | portable
    assert {name: home_of(name) for name in named} == homes | dict.fromkeys(portable)
    for platform in PLATFORMS:
        for name, home in homes.items():
            if home != platform and name in get_args(ExpertKernel):
                reason = f"implementation {name!r} needs a {home}, this is a {platform}; 'xla' can run"
                assert grouped_mlp.why_not(name, platform, "bfloat16") == reason


FITS, FITS_NOT = (
    ((8, 128, 256), (Heads(8, 2, 128),)),
    ((8, 96, 100), (Heads(8, 2, 128), Heads(8, 2, 128, Span(chunk=9)))),
)


@pytest.mark.parametrize(
    ("platform", "shapes", "taken"),
    [
        ("tpu", FITS, ("pallas_tpu", "xla", "tpu", "pallas_tpu")),
        ("tpu", FITS_NOT, ("xla", "xla", "xla", "pallas_tpu")),
        ("gpu", FITS, ("pallas_gpu", "xla", "gpu", "pallas_gpu")),
        ("gpu", FITS_NOT, ("xla", "xla", "xla", "pallas_gpu")),
        ("cpu", FITS, ("cpu", "cpu", "cpu", "xla")),
        ("cpu", FITS_NOT, ("cpu", "cpu", "cpu", "xla")),
        ("another", FITS, ("xla", "xla", "xla", "xla")),
    ],
)
def test_the_first_that_is_supported_is_taken(platform: str, shapes, taken: tuple[str, ...]):
    if platform == "cpu" and cpu.why_missing() is not None:
        taken = ("xla",) * 4
    dims, heads = shapes
    found = choose_kernels(platform, "bfloat16", None, dims, heads, BinningNeeds(128, RULE))
    assert (found.experts, found.dense, found.attention, found.binning) == taken
    assert found.rotation == found.dense


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_portable_model_is_portable_in_its_dense_products_too(platform: str):
    found = choose_kernels(platform, "bfloat16", "xla", *FITS)
    assert found.dense == "xla" and found.rotation == "xla"
    assert found.attention == (platform if platform != "cpu" else "xla")


def test_the_order_is_that_of_the_names_and_the_last_is_not_asked():
    lacks = {"a": "a is broken", "b": None}
    praised = "{} is good".format
    assert first_supported(("b", "a", "xla"), lacks.__getitem__, praised) == ("b", "b is good")
    assert first_supported(("a", "b", "xla"), lacks.__getitem__, praised) == ("b", "b is good")
    assert first_supported(("a", "xla"), lacks.__getitem__, praised) == ("xla", "portable XLA: a is broken")
    assert first_supported(("xla",), lacks.__getitem__, praised) == ("xla", "portable XLA")


@pytest.mark.parametrize(
    ("platform", "storage", "tokens", "exchange", "executor", "has_copies"),
    [
        ("cpu", "uint16", 64, emulated_ragged_all_to_all, "graph", False),
        ("gpu", "bfloat16", 256, lax.ragged_all_to_all, "host", False),
        ("tpu", "bfloat16", 64, lax.ragged_all_to_all, "graph", True),
    ],
)
def test_the_engine_reads_the_record(platform: str, storage, tokens, exchange, executor, has_copies):
    assert grouped_mlp.storage_dtype(jnp.dtype("bfloat16"), platform) == storage
    assert grouped_mlp.storage_dtype(jnp.dtype("float32"), platform) == "float32"
    assert get_backend(platform).num_row_tokens == tokens
    assert get_exchange(platform, "expert").func is exchange
    picked, why = pick_executor(OffloadConfig(slots_per_layer=2), mesh_on(platform))  # pyright: ignore
    assert picked == executor and why == get_backend(platform).why_executor
    assert has_parallel_copies(mesh_on(platform)) == has_copies  # pyright: ignore
    device = SimpleNamespace(platform=platform, memory_stats=lambda: {"bytes_limit": 7}, device_kind="it")
    room = device_room(device)
    assert room is not None and (room.bytes == 7) == (not get_backend(platform).has_host_memory)


def test_a_platform_without_a_record_has_what_xla_has():
    assert get_backend("another") == Backend("another") and "another" not in BACKENDS
    assert all(get_backend(platform) is BACKENDS[platform] for platform in PLATFORMS)


def test_a_cpu_still_lacks_the_ragged_exchange():
    """If this fails, the emulation can go."""
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:1])

    def run(x):
        one = jnp.ones(1, jnp.int32)
        return lax.ragged_all_to_all(x, x, one * 0, one, one * 0, one, axis_name="expert")

    spec = PartitionSpec("expert")
    with pytest.raises(Exception, match=r"(?i)ragged.all.to.all"):
        jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.ones((1, 2)))


@pytest.mark.parametrize("module", ["jmoe_kernels.backends", "jmoe.config.model", "jmoe.config.moe"])
def test_records_and_configurations_need_no_jax(module: str):
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_records_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BACKENDS["cpu"].name = "gpu"  # pyright: ignore
