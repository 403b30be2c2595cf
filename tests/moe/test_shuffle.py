"""Tests token shuffling: the order of the tokens, and that no guess ever changes the output."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.small import config, decoder, mesh_of, tokens

from jmoe.config.counters import LOSSY, names
from jmoe.config.moe import MoEConfig
from jmoe.models.journey import StepSettings
from jmoe.moe.orders import Hints, Move, Order, ShuffleTables, align, expected_shares, majority_rank
from jmoe.moe.shuffle import Shuffle
from jmoe.moe.types import MoEOutput, Routing
from jmoe.nn.sequences import Sequences

RANKS, ROWS = 4, 16


@jax.jit
def aligned(share_NR, valid_N):
    return align(share_NR, valid_N)


def placed(share: np.ndarray, valid: np.ndarray) -> list[int]:
    """Returns each token's rank, by a loop over single requests for a rank.

    In each round all tokens that wait make a request, the surest token first.
    """
    rank, room = [-1] * ROWS, [ROWS // RANKS] * RANKS
    while -1 in rank:
        asks: list[list[tuple[int, int]]] = [[] for _ in range(RANKS)]
        for token in (i for i in range(ROWS) if rank[i] < 0):
            best = max(
                (r for r in range(RANKS) if room[r]), key=lambda r: (valid[token] * share[token, r], -r)
            )
            asks[best].append((-share[token, best] if valid[token] else 1, token))
        for r, wishes in enumerate(asks):
            for _, token in sorted(wishes)[: room[r]]:
                rank[token] = r
            room[r] -= min(room[r], len(wishes))
    return rank


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), skew=st.sampled_from([0.0, 0.5, 1.0]), absent=st.floats(0, 1))
def test_every_rank_gets_equally_many_and_the_surest_ask_first(seed: int, skew: float, absent: float):
    rng = np.random.default_rng(seed)
    share = rng.integers(0, 256, (ROWS, RANKS)).astype(np.int32)
    share[rng.random(ROWS) < skew] = [255, 3, 2, 1]
    valid = rng.random(ROWS) >= absent
    order = jax.tree.map(np.asarray, aligned(share, valid))
    assert sorted(order.token_N) == list(range(ROWS))
    np.testing.assert_array_equal(order.token_N[order.row_N], np.arange(ROWS))
    np.testing.assert_array_equal(order.row_N // (ROWS // RANKS), placed(share, valid))


def test_an_order_is_by_token_number_within_a_rank():
    order = aligned(jnp.asarray(np.eye(RANKS, dtype=np.int32)[np.arange(ROWS) % RANKS]), jnp.ones(ROWS, bool))
    np.testing.assert_array_equal(order.token_N.reshape(RANKS, -1), np.arange(ROWS).reshape(-1, RANKS).T)


def test_the_surer_table_is_believed():
    by_token = np.array([[200, 55], [130, 125]], np.uint8)
    by_history = np.array([[0, 0], [5, 250], [0, 0], [100, 155]], np.uint8)
    ids, history = jnp.array([0, 1, 0, 1]), jnp.array([[0, 1], [0, 1], [1, 1], [1, 1]])
    tables = ShuffleTables(by_token, by_history)
    assert expected_shares(Hints(tables, None), ids).tolist() == by_token[ids].tolist()
    assert expected_shares(Hints(tables, history), ids).tolist() == [
        [5, 250],
        [5, 250],
        [200, 55],
        [100, 155],
    ]


def test_a_tokens_rank_is_that_of_most_of_its_experts():
    assert majority_rank(jnp.array([[0, 1, 7], [7, 6, 0], [0, 2, 4], [4, 2, 2]]), 2, 4).tolist() == [
        0,
        3,
        0,
        1,
    ]


# ---- rows and what is reported of them

SHAPES = [(1, 4, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]
PER_RANK = 3


def order_of(kind: str, groups: int, ranks: int, seed: int = 0) -> Order:
    """Returns orders of the kind: most are the same in every group; random ones differ between groups."""
    own = np.arange(ranks * PER_RANK, dtype=np.int32)
    rng = np.random.default_rng(seed)
    token_GN = {
        "own": np.stack([own] * groups),
        "next rank": np.stack([np.roll(own, PER_RANK)] * groups),
        "within ranks": np.stack([own.reshape(ranks, PER_RANK)[:, ::-1].ravel()] * groups),
        "random": np.stack([rng.permutation(own) for _ in range(groups)]),
    }[kind]
    row_GN = np.argsort(token_GN, axis=1).astype(np.int32)
    return Order(jnp.asarray(token_GN.ravel()), jnp.asarray(row_GN.ravel()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_move_from_one_order_to_the_other_bit_for_bit(shape: tuple[int, int, int]):
    """None of the rows moves, all do, only places within a rank change, or anything happens."""
    groups, ranks, _ = shape
    shuffle = Shuffle(mesh_of(shape), 8)
    n = ranks * PER_RANK
    bits_GND = np.random.default_rng(0).integers(0, 2**32, (groups, n, 5), dtype=np.uint32)
    move = jax.jit(lambda rows, a, b: shuffle.move(rows, Move(a, b)))
    kinds = ("own", "next rank", "within ranks", "random")
    for seed, (before, after) in enumerate((a, b) for a in kinds for b in kinds):
        a, b = order_of(before, groups, ranks, seed), order_of(after, groups, ranks, 100 + seed)
        by_a, by_b = (
            np.take_along_axis(bits_GND, np.asarray(o.token_N).reshape(groups, n, 1), axis=1) for o in (a, b)
        )
        got = np.asarray(move(by_a.reshape(-1, 5).view(np.float32), a, b)).view(np.uint32)
        np.testing.assert_array_equal(got, by_b.reshape(-1, 5), err_msg=f"{before} to {after}")
    jax.tree.map(
        np.testing.assert_array_equal, shuffle.original_order(groups * n), order_of("own", groups, ranks)
    )


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("lossy", [True, False])
def test_what_a_layer_reports_is_in_the_tokens_own_order(history: bool, lossy: bool):
    groups, ranks, experts = 2, 4, 8
    n = groups * ranks * PER_RANK
    rng = np.random.default_rng(0)
    ids_NK = rng.integers(0, experts, (n, 3)).astype(np.int32)
    counts = rng.integers(0, 2**31, (len(LOSSY), n)).astype(np.int32)
    order = order_of("random", groups, ranks)
    # the row of each token in all groups together
    row_N = np.asarray(order.row_N) + np.repeat(np.arange(groups), ranks * PER_RANK) * ranks * PER_RANK
    token_N = np.argsort(row_N)
    routing = Routing(ids_NK[token_N], *[jnp.zeros((n, 1))] * 3)
    changes = dict(zip(names(LOSSY), counts[:, token_N], strict=True)) if lossy else None
    out = MoEOutput(jnp.zeros((n, 1)), routing, None, changes)  # pyright: ignore[reportArgumentType]
    shuffle = Shuffle(mesh_of((groups, ranks, 1)), experts)
    report = jax.jit(partial(shuffle.report, history=history))
    reported, rank_N = report(out, order)
    expected = dict(zip(names(LOSSY), counts.tolist(), strict=True)) if lossy else None
    assert jax.tree.map(lambda a: a.tolist(), reported.changes) == expected
    want = majority_rank(jnp.asarray(ids_NK), experts // ranks, ranks).tolist() if history else None
    assert (rank_N if rank_N is None else rank_N.tolist()) == want
    assert ("all_gather" in str(jax.make_jaxpr(report)(out, order))) == (history or lossy)


# ---- in the model

CFG = config(num_experts=16, num_experts_per_tok=4, num_hidden_layers=4)


def tables_of(kind: str, ranks: int) -> list[ShuffleTables]:
    """Returns guesses that have nothing to do with the model: all to one rank, or anything."""
    rng, found = np.random.default_rng(1), []
    for _ in range(CFG.num_hidden_layers):
        shapes = (CFG.vocab_size, ranks), (ranks * ranks, ranks)
        if kind == "one rank":
            found.append(ShuffleTables(*(np.eye(ranks, dtype=np.uint8)[np.zeros(n, int)] for n, _ in shapes)))
        else:
            found.append(ShuffleTables(*(rng.integers(0, 256, s).astype(np.uint8) for s in shapes)))
    return found


@pytest.mark.matrix
@pytest.mark.parametrize(("shape", "kind"), [((1, 4, 1), "one rank"), ((2, 2, 2), "random")], ids=str)
def test_no_guess_changes_the_output(shape: tuple[int, int, int], kind: str):
    mesh = mesh_of(shape)
    model = decoder(CFG, mesh, MoEConfig(attention="tp", transport="ragged_all_to_all"))
    positions = np.tile(np.arange(8, dtype=np.int32), (4, 1))
    positions[1, 5:] = -1
    seqs = Sequences(jnp.asarray(tokens(CFG, 4, 8)), jnp.asarray(positions))
    graph, state = nnx.split(model)

    @partial(jax.jit, static_argnums=0)
    def run(shuffled: bool, state, tables):
        out = nnx.merge(graph, state)(seqs, settings=StepSettings(tables=tables if shuffled else None))
        return out.hidden_RND, out.stats

    tables = tables_of(kind, shape[1])
    plain, plain_stats = run(False, state, tables)
    moved, stats = run(True, state, tables)
    np.testing.assert_allclose(moved[positions >= 0], plain[positions >= 0], atol=2e-5)
    for before, after in zip(plain_stats, stats, strict=True):
        np.testing.assert_array_equal(before.counts_E, after.counts_E)
        assert after.counts["dropped"] == 0
    remote = [[int(layer.counts["remote_assignments"]) for layer in each] for each in (plain_stats, stats)]
    assert kind == "one rank" or remote[0] != remote[1]
