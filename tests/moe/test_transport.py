"""Tests every transport against a loop in numpy: adversarial routing, absent assignments, moved rows."""

from functools import lru_cache, partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jmoe_kernels.grouped_mlp import ExpertWeights, pick, storage_dtype
from support.models.small import MESHES, config, decoder, mesh_of, tokens

from jmoe.config.moe import MoEConfig, TransportName
from jmoe.engine.step.counters import Count64, MoECounters, add_step, transported_bytes, zero_totals
from jmoe.mesh import EXPERT, TENSOR, TOKENS, make_mesh
from jmoe.moe import transport
from jmoe.moe.experts import ExpertMath
from jmoe.moe.transport import emulated_ragged_all_to_all
from jmoe.moe.types import DispatchStats, Routing, Traffic
from jmoe.nn.sequences import Sequences

TOKENS_IN_ALL, EXPERTS, MODEL, INNER = 48, 16, 24, 8
NAMES = ("replicated", "all_to_all", "ragged_all_to_all")


@lru_cache
def weights(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns gate_up and down in float32, rounded to ``dtype``."""
    rng = np.random.default_rng(1)
    shapes = (EXPERTS, 2, INNER, MODEL), (EXPERTS, MODEL, INNER)
    arrays = [jnp.asarray(rng.standard_normal(s, np.float32) * 0.4).astype(dtype) for s in shapes]
    return tuple(np.asarray(a.astype(jnp.float32)) for a in arrays)


@lru_cache
def program(name: str, shape: tuple[int, int, int], dtype: str, kernel: str = "xla"):
    """Returns jitted (x, ids, weights, valid) -> (y, traffic); "local" runs without ``shard_map``."""

    def shard(x_TD, ids_TJ, weights_TJ, valid_T, gate_up, down, *, send):
        experts = ExpertWeights(gate_up, down)
        mine = ExpertMath(kernel).local_experts(experts)
        unread_TE = jnp.zeros((x_TD.shape[0], EXPERTS))
        routing = Routing(ids_TJ, weights_TJ, unread_TE, unread_TE)
        y_TD, traffic = send(x_TD, routing, valid_T, mine)
        if send is transport.local:
            return y_TD, traffic
        return lax.psum(y_TD, TENSOR), lax.psum(traffic, TOKENS)

    stored = storage_dtype(jnp.dtype(dtype))
    stacks = [jnp.asarray(w).astype(dtype).view(stored) for w in weights(dtype)]
    if name == "local":
        return jax.jit(lambda *args: shard(*args, *stacks, send=transport.local))
    send = transport.get_transport(name, "cpu")
    specs = (*(P(TOKENS),) * 4, P(EXPERT, None, TENSOR), P(EXPERT, None, TENSOR))
    run = jax.shard_map(
        partial(shard, send=send), mesh=mesh_of(shape), in_specs=specs, out_specs=(P(TOKENS), P()),
        check_vma=False,
    )  # fmt: skip
    return jax.jit(lambda *args: run(*args, *stacks))


def routings(shape: tuple[int, int, int], columns: int = 4) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns name -> (ids [T, J], valid [T]): random and adversarial ones."""
    rng = np.random.default_rng(columns)
    ids = rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.int32), (TOKENS_IN_ALL, 1)), axis=1)[:, :columns]
    some, every = rng.random(TOKENS_IN_ALL) < 0.7, np.ones(TOKENS_IN_ALL, bool)
    local_experts = EXPERTS // shape[1]
    one_expert = np.where(np.arange(columns)[None] == columns - 1, EXPERTS - 1, EXPERTS) + 0 * ids
    last_rank = EXPERTS - 1 - np.arange(columns, dtype=np.int32) % local_experts
    last_rank[local_experts:] = EXPERTS  # no expert twice
    absent = np.where(rng.random(ids.shape) < 0.6, EXPERTS, ids)
    absent[rng.random(TOKENS_IN_ALL) < 0.2] = EXPERTS
    return {
        "random": (ids, some),
        "all to one expert": (one_expert, every),
        "all to one rank": (last_rank[None] + 0 * ids, every),
        "none valid": (ids, ~every),
        "some absent": (absent, some),
        "all absent": (np.full_like(ids, EXPERTS), every),
    }


def given(ids: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (x, combine weights).

    x is float32 but survives rounding to ``dtype``; absent assignments weigh 0.
    """
    rng = np.random.default_rng(2)
    x = rng.standard_normal((TOKENS_IN_ALL, MODEL), np.float32)
    shares = np.where(ids == EXPERTS, 0, rng.random(ids.shape, np.float32)).astype(np.float32)
    return x, shares


def loop(x: np.ndarray, ids: np.ndarray, shares: np.ndarray, valid: np.ndarray, dtype: str) -> np.ndarray:
    """Computes the layer assignment by assignment, in float64 on the rounded inputs."""
    gate_up, down = weights(dtype)
    rounded = np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32), np.float64)
    y = np.zeros(x.shape)
    for t, j in zip(*np.nonzero(valid[:, None] & (ids < EXPERTS)), strict=True):
        gate, up = gate_up[ids[t, j]].astype(np.float64) @ rounded[t]
        y[t] += shares[t, j] * (down[ids[t, j]].astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up))
    return y


def counted(name: str, ids: np.ndarray, valid: np.ndarray, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Returns (useful, sent) rows, restated token by token."""
    data, ranks, _ = shape
    per_rank, local_experts = TOKENS_IN_ALL // (data * ranks), EXPERTS // ranks
    useful = assigned = 0
    for t in np.flatnonzero(valid):
        home = t // per_rank % ranks
        away = [e // local_experts for e in ids[t] if e < EXPERTS and e // local_experts != home]
        useful, assigned = useful + len(set(away)), assigned + len(away)
    padded = data * ranks * (ranks - 1) * per_rank
    c = min(ids.shape[1], local_experts)
    return useful, {"replicated": padded, "all_to_all": padded * c, "ragged_all_to_all": assigned}[name]


def check(name: str, shape: tuple[int, int, int], dtype: str, columns: int = 4, kernel: str = "xla"):
    for case, (ids, valid) in routings(shape, columns).items():
        x, shares = given(ids, dtype)
        y, traffic = program(name, shape, dtype, kernel)(x, ids, shares, valid)
        close = {"atol": 1e-5} if dtype == "float32" else {"atol": 0.05, "rtol": 0.02}
        np.testing.assert_allclose(y, loop(x, ids, shares, valid, dtype), **close, err_msg=case)
        nobody = ~(valid & (ids < EXPERTS).any(1))
        assert not np.any(np.asarray(y)[nobody]), case
        want = (0, 0) if name == "local" else counted(name, ids, valid, shape)
        assert (int(traffic.useful_rows), int(traffic.sent_rows)) == want, case
        assert int(traffic.num_received) == np.sum(valid[:, None] & (ids < EXPERTS)), case


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_every_mesh_and_routing_equals_the_loop_and_moves_what_is_counted(shape, name: str):
    check(name, shape, "float32")


@pytest.mark.parametrize("name", ["local", *NAMES])
def test_bfloat16_with_the_platforms_own_kernel(name: str):
    check(name, (1, 4, 2), "bfloat16", kernel=pick("cpu", "bfloat16")[0])


@pytest.mark.parametrize("columns", [1, 4, 6])
def test_local_takes_absent_assignments(columns: int):
    check("local", (1, 1, 1), "float32", columns)


@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_columns(name: str, columns: int):
    check(name, (2, 4, 1), "float32", columns)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["all_to_all", "ragged_all_to_all"])
def test_row_transports_sum_as_one_device_does(name: str, dtype: str):
    """Rows travel as experts return them, in float32, and are summed at home in the same order.

    In float32 the results are equal bit for bit. A product of bfloat16 numbers may depend on its number of
    rows by some 1e-6 (on processors with AMX); rows that travelled in bfloat16 would differ by 1e-2.
    """
    for ids, valid in routings((1, 8, 1)).values():
        x, shares = given(ids, dtype)
        one = program("local", (1, 1, 1), dtype)(x, ids, shares, valid)[0]
        spread = program(name, (1, 8, 1), dtype)(x, ids, shares, valid)[0]
        np.testing.assert_allclose(spread, one, rtol=0, atol=0 if dtype == "float32" else 2e-5)


def written(operand, output, starts, sizes, lands):
    """Does what ``lax.ragged_all_to_all`` documents: [sender, row], ..., slices [sender, slice]."""
    result, each = output.copy(), starts.shape[1] // len(operand)
    for to in range(len(operand)):
        for sender in range(len(operand)):
            for i in range(to * each, (to + 1) * each):
                rows = operand[sender][starts[sender, i] : starts[sender, i] + sizes[sender, i]]
                result[to][lands[sender, i] : lands[sender, i] + len(rows)] = rows
    return result


@pytest.mark.parametrize("each", [1, 3])
def test_the_emulation_keeps_the_contract(each: int):
    """Slices are random: any part of the operand, some parts twice.

    They land with gaps, which keep their value, and on top of each other.
    """
    ranks, n, m, rng = 8, 12, 96, np.random.default_rng(each)
    run = partial(emulated_ragged_all_to_all, axis_name=EXPERT)
    exchange = jax.jit(
        jax.shard_map(run, mesh=make_mesh(1, ranks, 1), in_specs=P(EXPERT), out_specs=P(EXPERT))
    )
    for _ in range(5):
        starts = rng.integers(0, n, (ranks, ranks * each), np.int32)
        sizes = np.minimum(rng.integers(0, 4, starts.shape, np.int32), n - starts)
        lands = rng.integers(0, m - 3, starts.shape, np.int32)
        operand = rng.standard_normal((ranks, n, 5), np.float32)
        output = rng.standard_normal((ranks, m, 5), np.float32)
        received = sizes.reshape(ranks, ranks, each).swapaxes(0, 1)
        flat = [a.reshape(-1, 5) for a in (operand, output)]
        got = exchange(*flat, *(a.reshape(-1) for a in (starts, sizes, lands, received)))
        want = written(operand, output, starts, sizes, lands)
        assert np.isin(output, want).any() and not np.isin(output, want).all()
        np.testing.assert_array_equal(got, want.reshape(-1, 5))


def test_the_config_names_the_transports():
    assert tuple(transport.TRANSPORTS) == get_args(TransportName)


def test_an_unknown_transport_is_refused():
    with pytest.raises(ValueError, match="known: replicated, all_to_all, ragged_all_to_all"):
        transport.get_transport("ragged", "cpu")
    with pytest.raises(ValueError, match=r"moe\.transport must be one of .*ragged_all_to_all, got 'ragged'"):
        MoEConfig(transport="ragged")


def step(counts: int, rows: int) -> DispatchStats:
    """Returns the counts of one layer of 2 experts, all near the 32-bit limit."""
    each, row = jnp.full(2, counts, jnp.int32), jnp.asarray(rows, jnp.int32)
    traffic = Traffic(row, row, jnp.sum(each))
    return DispatchStats(each, each, jnp.zeros(2), traffic, {"remote_assignments": row, "rerouted": row})


def test_totals_of_many_large_steps_do_not_overflow():
    totals, most = zero_totals(1, 2), 2**31 - 1
    add = jax.jit(add_step)
    for _ in range(5):
        totals = add(totals, [step(most, most)])
    totals = add(totals, [step(0, 0)])
    cfg = config(dtype="bfloat16")
    counters = MoECounters(1, 2, row_bytes := transported_bytes(cfg, mesh_of((1, 2, 4))), 0)
    assert row_bytes == cfg.hidden_size * (2 + 4) * 4
    counters.drain(totals)
    counters.drain(totals)
    report = counters.report()
    assert report["steps"] == 10 and report["assignments"] == 20 * most
    assert report["remote_assignments"] == 10 * most
    assert report["transport_bytes"] == report["transport_useful_bytes"] == 10 * most * row_bytes
    assert report["per_layer"] == [{k: v for k, v in report.items() if k not in ("steps", "per_layer")}]


def test_a_step_without_a_valid_token_moves_nothing_that_counts():
    """Warm-up runs padding: the padded transports send it, but no request did."""
    totals = add_step(zero_totals(1, 2), [step(0, 7)])
    assert totals.steps == 0 and totals.sums_L["transport_bytes"].to_host().tolist() == [0]


def test_counts_carry_beyond_32_bits():
    count = Count64(jnp.full(2, 2**32 - 1, jnp.uint32), jnp.asarray([0, 5], jnp.uint32))
    want = [2**32 - 1 + 2, (5 << 32) + 2**32 - 1]
    assert count.plus(jnp.asarray([2, 0], jnp.int32)).to_host().tolist() == want


def test_a_decoder_gives_the_same_and_says_what_it_moved():
    cfg = config(num_hidden_layers=1)
    seqs = Sequences(tokens(cfg, 8, 4), np.tile(np.arange(4, dtype=np.int32), (8, 1)))

    def states(model):
        graph, state = nnx.split(model)
        return jax.jit(lambda s: nnx.merge(graph, s)(seqs))(state)

    out = states(decoder(cfg, mesh_of((2, 2, 2)), MoEConfig(transport="ragged_all_to_all")))
    one = states(decoder(cfg, make_mesh()))
    np.testing.assert_allclose(out.hidden_RND, one.hidden_RND, atol=1e-4)
    moved, remote = out.stats[0].traffic, out.stats[0].counts["remote_assignments"]
    assert 0 < moved.useful_rows <= moved.sent_rows == remote
    assert one.stats[0].traffic.sent_rows == one.stats[0].traffic.useful_rows == 0
