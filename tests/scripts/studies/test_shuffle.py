"""Tests Speculative MoE's study: arithmetic against hand counts, the document from small made-up figures."""

import numpy as np
import pytest
from shared.text_routing import Test as Tokens
from studies.shuffle import bytes as sent
from studies.shuffle import published
from studies.shuffle.moves import moved
from studies.shuffle.placed_tokens import dealt_ranks, on_ranks, oracle_tables, peak, rates, shuffled_ranks
from studies.shuffle.study import STUDY

from jmoe.moe.orders import ShuffleTables

# 4 tokens with 2 experts each; of 4 experts, 0 and 3 are on rank 0, and 1 and 2 on rank 1
HOME = np.array([[0, 1, 1, 0]])
CHOSEN = np.array([[[0, 3], [1, 2], [0, 1], [2, 3]]])
TOKENS = Tokens(np.array([0, 1, 2, 3]), CHOSEN)
RATES = {
    "random": {"local": 0.125, "pairs": 5.0},
    "grouped": {"local": 0.125, "pairs": 4.5},
    "shuffled": {"local": 0.35, "pairs": 3.0, "moved": 0.9},
}


def test_rates_of_tokens_on_ranks():
    where = on_ranks(TOKENS, HOME)
    assert where.tolist() == [[[0, 0], [1, 1], [0, 1], [1, 0]]]
    # tokens on ranks 0 0 1 1: 2, 0, 1, 1 of 8 are local; 0, 1, 1, 1 other ranks are needed
    assert dealt_ranks(1, 4, 2, 4).tolist() == [[0, 0, 1, 1]]
    assert rates(where, dealt_ranks(1, 4, 2, 4)) == {"local": 0.5, "pairs": 0.75}
    assert peak(where, 2) == 1.0
    assert oracle_tables(where, 4, 2) == {"equal": 0.75, "free": 0.75}


def test_tables_put_tokens_as_serving_does():
    table = ShuffleTables(np.array([[255, 0], [0, 255], [100, 90], [90, 100]], np.uint8))
    assert shuffled_ranks([table], TOKENS, HOME, 2, 4).tolist() == [[0, 1, 0, 1]]
    assert rates(on_ranks(TOKENS, HOME), np.array([[0, 1, 0, 1]])) == {"local": 0.75, "pairs": 0.5}


def test_moves_by_hand():
    """From chunks 0 0 1 1, two tokens move to the first layer, two to the second, and all four home."""
    found = moved(np.array([[0, 1, 0, 1], [1, 1, 0, 0]]), 2, 4)
    assert found == {"first": 0.5, "between": 0.5, "home": 1.0, "rows": 1.0}


def test_bytes_are_those_of_the_cost_model():
    """At G = 8 and k = 8, pipelines send 4.38, 3.05 and 3.5 times a row, with 2, 2 and 4 bytes a number."""
    found = {name: p.sent(RATES, 1, 8, 8) for name, p in sent.PIPELINES.items()}
    assert found["all-reduce, slice, all in 2 bytes"] == pytest.approx(2 * 4.375)
    assert found["shuffled, all in 2 bytes"] == pytest.approx(2 * 3.05)
    assert found["all-reduce, replicated tokens"] == pytest.approx(4 * 3.5)
    # whole rows of 2 + 4 bytes and 7 remote rows of 2 + 4 over 8 ranks
    assert found["plain"] == pytest.approx(6 * 7 / 8 + 7 / 8 * 6)
    # 0.9 rows of 4 bytes that move cost 0.45, 1.8 remote rows fewer save 1.35
    assert found["shuffled"] - found["plain"] == pytest.approx(0.45 - 1.35)
    assert found["shuffled, one row a pair"] == pytest.approx(6 * 7 / 8 + 3 / 8 * 6 + 0.9 / 8 * 4)
    counts = {name: p.collectives for name, p in sent.PIPELINES.items()}
    assert counts["plain"] == counts["replicated transport"] == 4 and counts["shuffled"] == 5
    assert counts["all-reduce, slice"] == 4 and counts["all-reduce, replicated tokens"] == 2


def test_time_is_latency_and_bytes():
    assert sent.seconds(100.0, 4, 64, "200 GbE") == pytest.approx(4 * 30e-6 + 6400 / 25e9)
    wide = sent.widened(RATES, 1, 8)
    assert wide["random"] == {"local": 0.125, "pairs": pytest.approx(0.875)}
    assert wide["shuffled"]["moved"] == 0.9


def test_published_rates_by_hand():
    """If two equally frequent ids need one rank each, tables keep all local, and batch order half."""
    counts = np.zeros((1, 2, 4), np.int64)
    counts[0, 0, [0, 1]] = counts[0, 1, [2, 3]] = 500
    home = np.array([[0, 0, 1, 1]])
    found = published.rates(counts, counts, home, 2, 2)
    assert found["local"] > 0.95 and 0.45 < found["dealt"] < 0.55
    assert found["peak"] == 1.0 and found["unseen"] == 0.0
    first, second = published.halves(counts)
    assert (first + second == counts).all() and 0 < first.sum() < counts.sum()
    table = published.rank_table(counts[0], home[0], 2, 2)
    np.testing.assert_allclose(table, [[1001 / 1002, 1 / 1002], [1 / 1002, 1001 / 1002]])


# ---- the document


def step(local: float, history: bool) -> dict:
    row = {"tables": {"local": local, "pairs": 2.0}, "dealt": {"local": 0.125, "pairs": 2.5}}
    more = {"history": {"local": local - 0.01, "pairs": 2.0}, "oracle": {"equal": 0.5, "free": 0.6}}
    return row | more if history else row


def method(local: float, load: float, history: bool = False) -> dict:
    steps = {size: step(local, history) for size in ("64", "256")}
    return {"steps": steps, "peak": load, "peak_single": load, "solver_seconds": 1.0}


def grouping(local: float) -> dict:
    inside = {
        "alternating": method(local, 1.0, True),
        "cross_entropy": method(0.3, 1.2),
        "exflow": method(0.4, 1.2),
        "random": method(0.2, 1.1),
    }
    across = {"unseen": 0.25, "alternating": method(0.2, 1.0, True), "random": method(0.15, 1.0)}
    return {
        "command": "run", "seconds": 60, "sizes": {"layers": 6, "experts": 32, "k": 4}, "width": 256,
        "domains": ["a"], "tokens": {"train": 10, "valid": 5}, "random_seeds": [10, 3],
        "in_domain": {ranks: {**inside, "unseen": 0.0} for ranks in ("4", "8", "16")},
        "across": {"a": across},
    }  # fmt: skip


def moves() -> dict:
    row = {"first": 0.875, "between": 0.75, "home": 0.875, "rows": 0.917}
    return {"command": "run", "seconds": 60, "devices": {ranks: {"256": row} for ranks in ("4", "8", "16")}}


def test_the_document_says_what_is_missed():
    text = STUDY.document({"grouping": grouping(0.475)})
    assert "`alternating`: 40.0 % fewer remote activations, target 30.0 % met" in text
    assert "`cross_entropy`: 20.0 % fewer remote activations, target 30.0 % **missed**" in text
    assert "`exflow`" in text and "target at most +5 % **missed**" in text
    assert "8.6 % in the mean, **missed**" in text and "a (25.0 % unseen)" in text
    assert text.count("Not measured yet") == 5


def test_the_document_of_bytes_published_and_the_engine():
    figures = sent.measure(grouping(0.475), moves())
    rate = {"local": 0.4, "dealt": 0.125, "peak": 1.2, "unseen": 0.1}
    methods = {name: {"a>a": rate, "a>b": rate, "b>a": rate, "b>b": rate} for name in published.METHODS}
    model = {"ranks": 8, "k": 8, "domains": ["a", "b"], "methods": methods}
    phase = {"remote": 0.8, "useful_bytes": 1000, "bytes": 2000}
    run = {"same": 8, "prefill": phase, "decode": phase, "wall_seconds": 1.0}
    text = STUDY.document({
        "moves": moves(),
        "bytes": {"command": "run", **figures},
        "published": {"command": "run", "seconds": 60, "size": 256, "models": {"olmoe": model}},
        "engine": {
            "command": "run", "seconds": 60, "ranks": 4, "groups": 2, "sequences": 8, "prompt": 4, "new": 2,
            "runs": {"plain": run, "shuffled": run | {"same": 7}},
        },
    })  # fmt: skip
    assert "in-domain 31.4 % fewer remote activations in the mean, met" in text
    assert "The tokens of `plain` were generated not by shuffled" in text
    assert "| plain | 8 of 8 | 80.0 %" in text
    assert "| 8, 256 | 87.5 % | 75.0 % | 87.5 % | 0.92 |" in text
    shape = figures["shapes"]["tiny/8"]
    word = "costs" if shape["rows"]["shuffled"]["bytes"] > shape["rows"]["plain"]["bytes"] else "saves"
    assert f"tiny shape, 8 devices: shuffling {word}" in text


def test_the_largest_bonus_within_a_percent_is_named():
    rows = {"0.0": (10.0, 3.0), "0.5": (10.02, 2.4), "1.0": (10.2, 1.5)}  # nats of a window, rows per token
    runs = {b: {"nll": [n] * 4, "rows": r, "remote": 0.5, "active": 9.0} for b, (n, r) in rows.items()}
    figures = {"command": "run", "seconds": 60, "domains": ["a", "b"], "windows": 2, "length": 11, "ranks": 8}
    text = STUDY.document({"locality": figures | {"batch": 4, "runs": {"no binning": runs}}})
    assert "| 0.5 | 50.0% | 2.40 | 9.0 | +0.20" in text and "| +2.02" in text
    assert "Within 1 % of the lossless perplexity: 0.5 nats, 20% fewer rows" in text
