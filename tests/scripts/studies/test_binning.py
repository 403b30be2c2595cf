"""Tests LYNX's study: arithmetic against hand counts, the document from small figures, a small meter."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from shared import teacher_forcing
from shared.random_checkpoint import write_random
from shared.results import perplexity_change, verdict
from studies.binning import gpu as binning_gpu
from studies.binning import speed
from studies.binning.capacity import loads_and_loss
from studies.binning.curves import METHODS, Curve, compared
from studies.binning.study import STUDY

from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import BinningConfig
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings

CURVE = Curve(np.array([0.5, 1.0]), np.array([[0.02, 0.04], [0.0, 0.0]]))
TOY = """architecture = "OlmoeForCausalLM"
vocab_size = 64
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 32
num_experts = 16
num_experts_per_tok = 2
moe_intermediate_size = 32
max_position_embeddings = 256
qk_norm = "full"
[router]
norm_topk_prob = false
"""


def test_a_curve_interpolates_window_by_window_and_ends_at_plain_topk():
    middle = CURVE.at(0.75)
    assert middle is not None
    np.testing.assert_allclose(middle, [0.01, 0.02])
    assert CURVE.at(0.4) is None and (CURVE.at(1.0) == np.zeros(2)).all()
    ratio, crossed = CURVE.ratio_at(1.0)
    assert crossed and ratio == pytest.approx(1 - 0.5 * np.log(1.01) / 0.03)
    assert CURVE.ratio_at(10.0) == (0.5, False)


def test_a_curve_is_read_from_settings_in_the_order_of_their_ratios():
    run = {
        "lossless": {"active": 8.0, "plain": 8.0},
        "oea/2": {"delta": [10, 30], "active": 6.0, "plain": 8.0},
        "oea/1": {"delta": [20, 60], "active": 4.0, "plain": 8.0},
        "budget/0.5": {"delta": [0, 0], "active": 4.0, "plain": 8.0},
    }
    curve = Curve.of(run, "oea", tokens=10)
    assert curve.ratio_S.tolist() == [0.5, 0.75, 1.0]
    np.testing.assert_allclose(curve.delta_SN, [[0.02, 0.06], [0.01, 0.03], [0, 0]])


def test_errors_are_stratified_by_domain_and_verdicts_need_two_of_them():
    value, error = perplexity_change(np.array([0.01, 0.03, 0.02, 0.02]), domains=2)
    # The first domain's windows vary by 0.0002, the second's do not: sqrt(2 * 0.0002) / 4.
    assert value == pytest.approx(100 * np.expm1(0.02)) and error == pytest.approx(0.5 * np.exp(0.02))
    worse = Curve(CURVE.ratio_S, CURVE.delta_SN + np.array([[0.02, 0.02], [0.0, 0.0]]))
    judged = compared(CURVE, worse, 0.5, domains=1)
    assert judged == (pytest.approx(100 * np.expm1(0.02)), pytest.approx(0))
    assert compared(CURVE, worse, 0.3, domains=1) is None
    assert [verdict(d, 0.1) for d in (0.3, 0.1, -0.3)] == ["yes", "even", "no"]


def test_batches_hold_one_domain_or_all_in_turn():
    assert teacher_forcing.batches(2, 4, 2, "single").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert teacher_forcing.batches(2, 4, 4, "mixed").tolist() == [[0, 4, 1, 5], [2, 6, 3, 7]]


def figures() -> dict:
    """Returns figures of two domains with two windows each, at half of the experts.

    Affinity loses 1 %, the other methods 2 %.
    """
    runs: dict = {}
    for name in ("single/16", "mixed/16", "single/16/half", "mixed/16/half"):
        plain = {"nll": [30.0, 40.0, 30.0, 40.0], "active": 8.0, "plain": 8.0, "remapped": 0.0}
        runs[name] = {"lossless": plain}
        for method in METHODS:
            lost = 10 if method == "affinity" else 20
            row = {"delta": [lost, lost + 1, lost, lost - 1], "active": 4.0, "plain": 8.0, "remapped": 0.25}
            runs[name][f"{method}/1"] = row | {"late": row["delta"]}
    quality = {"command": "c", "domains": ["a", "b"], "windows": 2, "length": 11, "runs": runs, "seconds": 60}
    row = {"nll": [30.0] * 4, "active": 8.0, "expert_peak": 2.0, "device_peak": 1.5}
    row |= {"remapped": 0.1, "dropped": 0.1, "rerouted": 0.0}
    by = {"off": {"off": row}, "0.5": {"off": row | {"active": 4.0}, "drop/1": row, "drop/1.5": row}}
    capacity = {"command": "c", "domains": ["a", "b"], "windows": 2, "length": 11, "ranks": 8, "seconds": 60}
    layer = {"dims": [64, 8, 8], "top_k": 8, "tokens": 16, "layers": 2, "kernel": "k", "r_squared": 0.9}
    layer |= {"seconds": {"64": 2e-3, "32": 1e-3}, "fixed": 0.0, "each": 1e-3 / 32, "expert_bytes": 1000}
    layer |= {"bytes_per_s": 1e9, "read_bandwidth": 2e9, "stage": {"route": 1e-5, "affinity": 3e-5}}
    engine = {"sizes": "s", "context": 8, "new": 8, "gate_scale": 1.5, "logit_std": [0.9, 1.1]}
    engine["batches"] = {"16": {
        "width": 0.5, "share": 0.5, "active": 20.0, "union": 40.0, "ratio": [1.2, 1.1, 1.3],
        "tokens_per_second": {"jmoe": [10.0], "binned": [12.0]}, "equal_tokens": 0.5,
    }}  # fmt: skip
    gpu = {"command": "c", "device": "d", "dims": [128, 8, 8, 8], "tokens": 16, "width": 0.5, "kernels": "k"}
    gpu |= {
        "active": {"plain": 80.0, "binned": 40.0},
        "expert_bytes": 1e6,
        "seconds": {"plain": 2e-4, "binned": 1e-4},
    }
    return {
        "quality": quality,
        "capacity": capacity | {"runs": {"16": by, "64": by}},
        "speed": {"command": "c", "threads": 2, "rounds": 3, "layer": layer, "engine": engine, "seconds": 60},
        "speed_gpu": gpu,
    }


def test_the_document_renders_from_small_figures():
    text = STUDY.document(figures())
    assert "Not measured yet" not in text
    assert "| affinity | +0.60 ± 0.02 | 0.50 | met |" in text  # 1.005 % at half, so 0.6 % at 70 %
    assert "* against random: better in 6, even in 0, worse in 0 of 6" in text
    assert "target 0.95: **missed**" in text and "1.20 (1.10..1.30) | **missed**" in text
    assert "1, 1, 1 at batch 16; 1, 2, 2 at batch 64" in text
    assert text.count("| 0.5 | drop/1, 1.5 | 8.0 |") == 2  # equal figures make one row
    for row in (line for line in text.splitlines() if line.startswith("|")):
        assert row.endswith("|")
    assert STUDY.document({}).count("Not measured yet") == 4


def test_where_affinity_is_worse_the_document_names_it():
    found = figures()
    found["quality"]["runs"]["mixed/16"]["oea/1"]["delta"] = [0, 1, 0, -1]
    text = STUDY.document(found)
    assert "worse in 3 of 6 (worse: mixed/16 at 80%, mixed/16 at 70%, mixed/16 at 55%)\n" in text


def test_layer_inputs_and_the_line_through_its_times():
    ids = speed.even_ids(16, 8, 48)
    loads = np.bincount(ids.ravel(), minlength=48)
    assert set(loads) == {2, 3} and all(len(set(row)) == 8 for row in ids.tolist())
    assert speed.bisect(lambda width: min(1.0, width / 2), 0.5, 0.0, 4.0) == (1.0, 0.5)
    fixed, each, r_squared = speed.linearity([1, 2, 4], [3.0, 5.0, 9.0])
    assert (fixed, each, r_squared) == (pytest.approx(1), pytest.approx(2), pytest.approx(1))


def test_scaled_gates_have_logits_of_deviation_one(tmp_path: Path):
    (tmp_path / "toy.toml").write_text(TOY)
    write_random(tmp_path / "toy.toml", tmp_path, gate_scale=1 / (0.02 * 8))
    assert all(0.8 < std < 1.2 for std in speed.logit_std(tmp_path))


def test_a_gpu_layer_runs_in_small_and_is_skipped_without_a_gpu(capsys):
    found = binning_gpu.measure(dry=True)
    assert found is not None and set(found["seconds"]) == {"plain", "binned"}
    assert found["active"]["binned"] < found["active"]["plain"]
    assert binning_gpu.measure(dry=False) is None and "skipped" in capsys.readouterr().out


def test_the_meter_leaves_a_batch_of_one_alone_and_counts_a_binned_batch():
    tokens = np.random.default_rng(0).integers(1, 8000, (4, 6)).astype(np.int32)
    scorer, losses, counts = teacher_forcing.Scorer("tiny"), {}, {}
    for name, cfg in (("plain", None), ("binned", BinningConfig(bin_width=0.1))):
        settings = EngineSettings(max_num_seqs=4, max_model_len=32, moe=MoEConfig(binning=cfg))
        with closing(build_engine("tiny", settings, warm_up=False)) as engine:
            meter = teacher_forcing.Meter(engine, scorer, tokens)
            alone = meter.run(np.array([[2]]))
            losses[name] = alone, meter.run(np.arange(4)[None])
            counts[name] = loads_and_loss(meter, engine, np.arange(4)[None])
    np.testing.assert_array_equal(losses["plain"][0], losses["binned"][0])
    np.testing.assert_allclose(losses["plain"][0][2], losses["plain"][1][2], atol=0.02)
    assert counts["plain"]["remapped"] == 0 < counts["binned"]["remapped"]
    assert counts["binned"]["active"] < counts["plain"]["active"]
    assert counts["plain"]["nll"] == losses["plain"][1].sum(1).round(2).tolist()
