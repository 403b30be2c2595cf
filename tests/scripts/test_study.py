"""Tests the driver of the studies: what a command repeats, how a part is stored, and strict templates."""

import argparse
import json
import shlex
import sys
from pathlib import Path

import pytest
import study
from jinja2 import UndefinedError
from shared.document import render
from shared.results import dumps
from studies.record import Part, Study
from support.documented_commands import COMMANDS


def requested(*words: str) -> tuple[Study, list[Part], str]:
    """Returns the study that the words name, its requested parts, and the command of the last part."""
    args = study.make_parser().parse_args(words)
    mine = study.STUDIES[args.study]
    parts = study.requested_parts(mine, args)
    return mine, parts, study.command(mine, parts[-1], args)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("capacity --parts speed --gpu --rounds 3 --data /x", "capacity {} --parts speed --rounds 3 --gpu"),
        (
            "lynx --parts speed --batches 8 16 --gpu --length 32",
            "binning {} --parts speed --batches 8 16 --gpu",
        ),
        (
            "binning --parts capacity --model /m --domains a b",
            "binning {} --parts capacity --model /m --domains a b",
        ),
        ("speculative --parts locality --model /m", "shuffle {} --parts locality --model /m"),
        ("shuffle --parts moves --train 2 --dry", "shuffle {} --parts moves --train 2"),
        ("together", "together {}"),
        ("ttft --prompt 8", "ttft --prompt 8"),
        (
            "serving --parts vllm --concurrency 1 8 --peer-command /x/vllm --peer-options '--a b' --batch 2",
            "serving {} --parts vllm --concurrency 1 8 --peer-options '--a b'",
        ),
        ("together --profile-tokens 64 --ranks 8", "together {} --profile-tokens 64 --ranks 8"),
    ],
)
def test_a_command_has_the_options_of_its_part_that_are_not_at_their_defaults(words: str, command: str):
    found = requested(*shlex.split(words))[2]
    assert found == "python scripts/study.py " + command.format("--data ../shared/data")


@pytest.mark.parametrize("name", study.STUDIES)
def test_a_part_is_measured_in_the_file_of_its_name(name: str):
    for part in study.STUDIES[name].parts:
        assert (study.ROOT / f"scripts/studies/{name}/{part.name}.py").is_file(), part.name


@pytest.mark.parametrize("mine", [one for one in study.STUDIES.values() if not one.is_whole])
def test_every_option_names_its_parts_and_its_help_names_the_same(mine: Study):
    parser = argparse.ArgumentParser(add_help=False)
    mine.add_options(parser)
    for action in parser._actions:
        owners = [part.name for part in mine.parts if action.dest in part.options]
        if action.dest in mine.local_options:
            assert not owners
        else:
            assert owners and owners == (action.help or "").partition(":")[0].split(", "), action.dest
    known = {action.dest for action in parser._actions}
    assert known >= {name for part in mine.parts for name in part.options} | set(mine.local_options)


def test_an_option_below_its_least_value_is_refused(capsys):
    with pytest.raises(SystemExit):
        requested("serving", "--parts", "host", "--new", "3")
    assert "--new: must be at least 4" in capsys.readouterr().err


def test_parts_are_measured_in_the_order_of_the_options_and_an_only_part_without_being_named():
    assert [part.name for part in requested("offload", "--parts", "large", "simulate")[1]] == [
        "large",
        "simulate",
    ]
    assert [part.name for part in requested("together")[1]] == ["scores"]
    args = study.make_parser().parse_args(["together", "--document"])
    assert study.requested_parts(study.STUDIES["together"], args) == []


@pytest.mark.parametrize("name", study.STUDIES)
def test_a_study_has_its_stored_document_and_a_command_that_tries_it(name: str):
    mine, results = study.STUDIES[name], study.ROOT / "docs/results"
    text = mine.document(json.loads(mine.path(results, ".json").read_text()))
    assert text == mine.path(results, ".md").read_text()
    assert any(f"study.py {name} " in command.words for command in COMMANDS["scripts/study.py"])


@pytest.mark.parametrize(
    ("name", "part"), [("capacity", "load"), ("binning", "quality"), ("together", "scores")]
)
def test_a_part_without_its_data_is_skipped_and_the_document_says_so(
    name: str, part: str, tmp_path: Path, capsys, monkeypatch
):
    mine = study.STUDIES[name]
    words = ["--data", str(tmp_path), "--out", str(tmp_path), "--threads", "1"]
    words += [] if name == "together" else ["--parts", part]
    monkeypatch.setattr(sys, "argv", ["study.py", name, *words])
    monkeypatch.setattr(study, "pin", lambda threads: None)
    study.main()
    assert f"{part}: skipped, there is no" in capsys.readouterr().out
    assert "Not measured yet" in mine.path(tmp_path, ".md").read_text()
    assert not mine.path(tmp_path, ".json").exists()


def test_a_parts_figures_replace_its_last_ones(tmp_path: Path):
    args = study.make_parser().parse_args(["capacity", "--parts", "speed", "--gpu", "--out", str(tmp_path)])
    mine = study.STUDIES["capacity"]
    for speed in (1, 2):
        study.keep(mine, study.requested_parts(mine, args)[0], args, {"speed": speed})
    found = json.loads((tmp_path / "capacity.json").read_text())
    assert list(found) == ["speed_gpu"] and found["speed_gpu"]["speed"] == 2
    assert dumps({"a": {"b": [1, 2]}}) == '{\n "a": {\n  "b": [1, 2]\n }\n}\n'


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{{ nobody }}", UndefinedError),
        ("{{ found.nothing }}", UndefinedError),
        ("{{ 'x' if nobody }}", UndefinedError),
        ("{{ empty }}", ValueError),
        ("{{ none }}", ValueError),
    ],
)
def test_a_placeholder_without_a_value_is_an_error(text: str, error: type[Exception], tmp_path: Path):
    path = tmp_path / "x.md"
    path.write_text(text)
    with pytest.raises(error):
        render(path, {"found": {}, "empty": "", "none": None})


def test_a_condition_leaves_no_line_and_a_number_its_own_form(tmp_path: Path):
    path = tmp_path / "x.md"
    path.write_text('a\n{% if share %}\n{{ share | as(".1%") }} of {{ seconds | minutes }}\n{% endif %}\nb\n')
    assert render(path, {"share": 0.25, "seconds": 90}) == "a\n25.0% of 2\nb\n"
