"""Tests what docs/results/together.md says about its figures."""

from studies.together import tables
from studies.together.scores import ROWS
from studies.together.study import STUDY


def row(perplexity: float, nll: float, **moe) -> dict:
    zeros = ("dropped", "rerouted", "remapped", "expert_cache_hits", "expert_cache_misses")
    counts = dict.fromkeys((*zeros, "bytes_host_to_device"), 0) | {
        "assignments": 800, "remote_assignments": 200, "transport_bytes": 1024 * 1000,
        "active_experts": 20.0, "active_experts_baseline": 25.0, "max_over_mean_load": 1.5,
    }  # fmt: skip
    return {
        "perplexity": perplexity, "nll_per_token": nll, "tokens": 100, "tokens_per_second": 7.0,
        "settings": {"offload": {"slots_per_layer": 2}}, "moe": counts | moe,
    }  # fmt: skip


def test_a_row_is_against_plain_and_counts_by_token():
    plain = row(50.0, 3.9)
    ours = row(
        55.0, 4.0, dropped=200, expert_cache_hits=30, expert_cache_misses=10, bytes_host_to_device=51200
    )
    cells = dict(zip(tables.HEAD, tables.line("offload", ours, plain), strict=True))
    assert cells["perplexity"] == "55.000" and cells["against plain"] == "+10.00 %"
    assert cells["remote"] == "25.0 %" and cells["KiB between devices"] == "10.0"
    assert cells["cache hits"] == "75.0 %" and cells["KiB from the host"] == "0.5"
    assert cells["changed"] == "20.0 %", "of the router's assignments, the dropped among them"
    alone = dict(zip(tables.HEAD, tables.line("plain", plain, plain), strict=True))
    assert alone["cache hits"] == "all resident" and alone["against plain"] == ""


def test_the_document_tells_how_far_the_lossless_ones_are_from_plain():
    rows = {name: row(50.0, 3.9) for name in ROWS}
    rows["offload"] = row(50.0, 3.9 + 2e-6)
    rows["all four"] = row(60.0, 4.1)
    found = {
        "command": "python x", "date": "today", "machine": "m", "versions": {"jax": "1"}, "ranks": 4,
        "batch": 8, "length": 16, "seconds": 3, "rows": rows,
    }  # fmt: skip
    text = STUDY.document(found)
    assert "by at most 2.0e-06 nats" in text and "All four: +20.00 % perplexity" in text
    assert all(f"| {name} |" in text for name in ROWS)
