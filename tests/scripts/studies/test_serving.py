"""Tests the serving benchmarks' scripts: what is compared, the text of the page, the papers' tables."""

import argparse
import itertools
import tomllib
from pathlib import Path

import pytest
from acceptance.lm_eval_parity import compare, difference
from paper_table import filled, shown
from studies.serving import traces, transformers, vllm
from studies.serving.peers import Load
from studies.serving.study import STUDY as SERVING
from studies.serving.turns import copy_without_ends, prefill_options
from studies.ttft import cases
from studies.ttft.study import STUDY as TTFT

from jmoe.checkpoint import read_config
from jmoe.config.moe import MoEConfig
from jmoe.engine.deployment.settings import model_directory

ROOT = Path(__file__).parents[3]
TABLES = sorted((ROOT / "configs/eval").glob("*.toml"))


def sample(*answers):
    return {("task", i): [[list(a) if isinstance(a, tuple) else a]] for i, a in enumerate(answers)}


def test_equal_answers_are_equal_whatever_they_are_written_as():
    report = compare(sample(("-1.5", "False"), "text"), sample((-1.5, "False"), "text"))
    assert report == {"numbers": 1, "worst": 0.0, "where": None, "texts": 2, "unequal": []}


def test_the_worst_difference_and_unequal_texts_are_found():
    ours, theirs = sample((-10.0, "True"), "a", (-0.5, "x")), sample((-10.2, "True"), "b", (-0.501, "x"))
    report = compare(ours, theirs)
    assert report["worst"] == pytest.approx(0.2 / 10.2) and report["where"] == ["task", 0, -10.0, -10.2]
    assert report["unequal"] == [["task", 1, "a", "b"]]


def test_a_number_that_is_none_is_a_difference():
    assert compare(sample("nan", -1.0), sample(-1.0, -1.0))["worst"] == float("inf")


def test_the_smaller_difference_counts():
    assert difference(-2000.0, -2000.01) == pytest.approx(5e-6, rel=1e-4)
    assert difference(-1e-6, -2e-6) == pytest.approx(1e-6)


@pytest.mark.parametrize(("ours", "theirs"), [({}, {}), (sample("a"), sample("a", "b"))])
def test_other_documents_cannot_be_compared(ours, theirs):
    with pytest.raises(SystemExit):
        compare(ours, theirs)


HEAD = {"date": "2026-01-01", "processor": "P", "cores": 2, "versions": {"jmoe": "1"}, "model": "tiny"}


def serving(ours: float, theirs: float, ttft: float, peer: str = "transformers") -> dict:
    def side(speed: float, first: float) -> dict:
        names = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_e2el_ms")
        return {"output_throughput": [speed] * 2, "client_cpu_share": [0.1] * 2, "tokens": [[5, 6]] * 2} | {
            name: [first] * 2 for name in names
        }

    settings = {"requests": 64, "input_len": 8, "output_len": 8, "rounds": 2}
    rows = {"32": {"jmoe": side(ours, ttft), peer: side(theirs, 10.0)}}
    more = {"dtype": "auto", "settings": settings, "flags": {"jmoe": "", peer: "--x"}, "rows": rows}
    return {"command": "c", **HEAD, **more}


def host(share: float) -> dict:
    times = {"step_ms": 10.0, "device_ms": 9.8, "host_ms": 10 * share, "host_share": share}
    return {"command": "c", **HEAD, "batch": 32, "steps": 4, "rounds": 3, **times}


@pytest.mark.parametrize(
    ("peer", "figures", "said"),
    [
        ("transformers", (320, 100, 9), ["3 times the peer's: met (3.20)", "1 times the peer's: met (0.90)"]),
        ("transformers", (290, 100, 11), ["3 times the peer's: missed (2.90)", "missed (1.10)"]),
        ("vllm", (140, 100, 11), ["median, ms, 32 at a time: at most 1 times the peer's: missed", "(1.40)"]),
    ],
)  # fmt: skip
def test_the_page_says_what_was_measured_and_which_targets_it_meets(peer, figures, said):
    page = SERVING.document({peer: serving(*figures, peer)})
    assert all(line in page for line in said) and "1 at a time" not in page


@pytest.mark.parametrize("peer", [transformers.PEER, vllm.PEER], ids=lambda peer: peer.command)
def test_a_peers_shown_words_leave_out_what_holds_here_alone(peer):
    words = peer.words(Path("/here/model"), 4321, Load(32, 64, 64, "auto"))
    shown = " ".join(peer.shown(words))
    assert "/here/model" in words and "4321" in words
    assert "here" not in shown.replace("--host", "") and "4321" not in shown and "--port" not in shown


def test_the_page_has_every_part_that_was_measured():
    page = SERVING.document({"transformers": serving(320, 100, 9), "host": host(0.03)})
    assert "busy for 3.0% of a step: the target of less than 5% is met" in page
    assert "takes 2.0% more than its programs alone: the target of less than 5% is met" in page
    assert "jmoe compared with `transformers serve" in page
    assert "vllm" not in page and "Recorded arrivals" not in page


def test_a_prefill_row_has_its_own_lengths_and_table():
    args = argparse.Namespace(input_len=16, output_len=32, prefill_len=512, requests=None)
    alone = prefill_options(args)
    assert (alone.input_len, alone.output_len, alone.requests) == (512, 2, 4) and args.input_len == 16
    figures = serving(320, 100, 9)
    figures["prefill"] = {"input_len": 512, **figures["rows"]["32"]}
    page = SERVING.document({"transformers": figures})
    assert "prompts of 512 words and answers of two tokens" in page and page.count("| 320.0 | 100.0 |") == 2


def test_recorded_arrivals_have_a_row_a_server_and_a_line_of_what_a_lossy_one_costs():
    numbers = dict.fromkeys(traces.KEPT, 7.0) | {"completed": 3, "failed": 1, "prefix_hit_rate": None}
    plain = numbers | {"trace": "azure", "setting": "exact", "flags": "", "moe": None, "quality": None}
    prompt, moe = {"perplexity": 5.5, "perplexity_exact": 5.25}, {"remapped_share": 0.25}
    quality = {"prompt": prompt, "decode": {"nll_difference": 0.125}}
    lossy = plain | {"setting": "binned", "flags": "--moe-config X", "moe": moe, "quality": quality}
    scales = {"azure": {"file": "a.gz", "length_scale": 0.5, "time_scale": 0.25}}
    figures = {"command": "c", **HEAD, "max_num_seqs": 4, "scales": scales, "runs": [plain, lossy]}
    page = SERVING.document({"traces": figures})
    assert "| azure | exact | 3 of 4 | 7 | 7, 7 | 7.0, 7.0 | 7.0, 7.0 | 7 | 7.0 | - |" in page
    assert "25.0% of the assignments remapped; perplexity of prompts 5.500, exact 5.250" in page
    assert "cost +0.1250 nats per token" in page and "lengths times 0.5 and times times 0.25" in page


def test_the_copy_ends_no_text(tmp_path):
    copy_without_ends(model_directory("tiny"), tmp_path)
    assert read_config(tmp_path).eos_token_ids == ()
    assert not (tmp_path / "generation_config.json").exists() and (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_the_papers_tables_are_settings_that_jmoe_takes(path):
    table = tomllib.loads(path.read_text())
    for moe in filled(table["settings"], {"work": "/tmp"}).values():
        MoEConfig.from_dict(moe)
    assert len(table["settings"]) > 1 and all(isinstance(shots, int) for shots in table["tasks"].values())


def test_a_table_has_a_column_a_task():
    load = {"output_throughput": 9.0, "median_tpot_ms": 1.0, "p99_ttft_ms": 2.0}
    moe = {"remapped_share": 0.25, "dropped_share": 0.0}
    rows = {
        "plain": {"load": {**load, "moe": None}, "scores": {"gsm8k": 0.5}},
        "binned": {"load": {**load, "moe": moe}, "scores": {"gsm8k": 0.25}},
    }
    lines = shown(rows, ["gsm8k"]).splitlines()
    assert lines[0].endswith("| remapped | dropped | gsm8k |")
    assert lines[2] == "| plain | 9.00 | 1.00 | 2.00 | 0.0% | 0.0% | 0.500 |"
    assert lines[3] == "| binned | 9.00 | 1.00 | 2.00 | 25.0% | 0.0% | 0.250 |"


def test_the_time_to_the_first_token_is_compared_with_the_smallest_engine_that_holds_as_many(monkeypatch):
    rounds = {(1, 1): [2, 4, 8], (1, 64): [3, 4, 10], (16, 1): [2, 3, 4], (16, 64): [2, 2, 2]}

    class Engine:
        """An engine that is slow in its two warm-up rounds, of which nothing is kept."""

        def __init__(self, directory, args, slots: int, pool: int):
            self.times = itertools.cycle([1e9, 1e9, *rounds[slots, pool]])

        def first_tokens(self, count: int, busy: int) -> list[float]:
            return [next(self.times)] * count

    monkeypatch.setattr(cases, "Bench", Engine)
    args = argparse.Namespace(slots=[16, 1], pools=[64, 1], requests=[1], busy=8, rounds=3)
    found = cases.measure_cases(Path("model"), args)
    sizes = [(case["slots"], case["pool"], case["busy"], case["ratio"]) for case in found]
    assert sizes == [
        (1, 1, 0, 1.0), (1, 64, 0, 1.25), (16, 1, 0, 0.75), (16, 64, 0, 0.5),
        (16, 1, 8, 1.0), (16, 64, 8, 2 / 3),
    ]  # fmt: skip
    figures = {
        "command": "c", "model": "tiny", "prompt": 64, "rounds": 3, "processor": "p", "threads": 2,
        "versions": {"jmoe": "0"}, "date": "d", "cases": found,
    }  # fmt: skip
    page = TTFT.document(figures)
    assert "Worst ratio to the smallest engine that holds the case: 1.25 (target 1.1)." in page
    assert "| 1 | 64 | 1 | 0 | 4.00 | 3.00 | 1.25 |" in page
