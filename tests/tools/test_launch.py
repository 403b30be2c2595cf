"""Tests ``jmoe launch`` with fake agents on PATH that record their words and variables."""

import json
import os
import socket
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from support.command_line import run
from support.server.scripted_chat import NAME, Scripted, serving

from jmoe.cli import launch as launch_command
from jmoe.cli.launch import split_forwarded
from jmoe.tools.launch import AGENTS, Target, launch_of

RECORDER = """#!{python}
import json, os, sys
with open({out!r}, "w") as file:
    json.dump({{"words": sys.argv[1:], "variables": dict(os.environ)}}, file)
sys.exit(7)
"""


@pytest.fixture
def script():
    with serving(Scripted()) as script:
        yield script


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Puts a fake program of every agent on PATH; returns a function that returns what the last one got."""
    (tmp_path / "bin").mkdir()
    for agent in AGENTS.values():
        program = tmp_path / "bin" / agent.program
        program.write_text(RECORDER.format(python=sys.executable, out=str(tmp_path / "got")))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return lambda: json.loads((tmp_path / "got").read_text())


def settings(words: list[str]) -> dict[str, object]:
    """Returns the settings of Codex's ``-c`` words, as it reads them: TOML."""
    pairs = [b for a, b in pairwise(words) if a == "-c"]
    return tomllib.loads("\n".join(pairs))


def test_claude_gets_its_variables_and_words(script, recorded, capsys, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of another service")
    code, out, err = run(
        capsys,
        "launch",
        "claude",
        "--url",
        f"{script.url}/v1",
        "--api-key",
        "secret",
        "--",
        "-p",
        "--model",
        "x",
    )
    got = recorded()
    assert code == 7 and out == "" and got["words"] == ["-p", "--model", "x"]
    want = {
        "ANTHROPIC_BASE_URL": script.url,
        "ANTHROPIC_AUTH_TOKEN": "secret",
        "ANTHROPIC_MODEL": NAME,
        "ANTHROPIC_SMALL_FAST_MODEL": NAME,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    assert want.items() <= got["variables"].items() and "ANTHROPIC_API_KEY" not in got["variables"]
    assert f"jmoe: ANTHROPIC_BASE_URL={script.url}\n" in err and "secret" not in err
    assert "jmoe: ANTHROPIC_API_KEY is not passed on\n" in err and err.endswith("jmoe: claude -p --model x\n")
    assert script.keys == ["Bearer secret"]


def test_codex_gets_a_provider(script, recorded, capsys):
    code, _, _ = run(capsys, "launch", "codex", "--url", script.url, "--", "exec", "do it")
    got = recorded()
    assert code == 7 and got["words"][-2:] == ["exec", "do it"]
    assert settings(got["words"]) == {
        "model": NAME,
        "model_provider": "jmoe",
        "model_context_window": 4096,
        "model_providers": {
            "jmoe": {
                "name": "jmoe",
                "base_url": f"{script.url}/v1",
                "wire_api": "responses",
                "env_key": "JMOE_API_KEY",
            }
        },
    }
    assert got["variables"]["JMOE_API_KEY"] == "none"


def test_opencode_gets_its_configuration(script, recorded, capsys):
    assert run(capsys, "launch", "opencode", "--url", script.url, "--model", NAME)[0] == 7
    config = json.loads(recorded()["variables"]["OPENCODE_CONFIG_CONTENT"])
    assert config["model"] == config["small_model"] == f"jmoe/{NAME}"
    provider = config["provider"]["jmoe"]
    assert provider["options"] == {"baseURL": f"{script.url}/v1", "apiKey": "none"}
    assert provider["models"][NAME]["limit"]["context"] == 4096


@pytest.mark.parametrize("name", AGENTS)
def test_print_is_a_shell_script_that_does_the_same(name, script, recorded, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "x")
    words = ("launch", name, "--url", script.url)
    code, out, _ = run(capsys, *words, "--print", "--", "it's", "a b")
    assert code == 0 and not (tmp_path / "got").exists()
    done = subprocess.run(["/bin/bash", "-c", out])
    by_shell = recorded()
    assert done.returncode == 7 and run(capsys, *words, "--", "it's", "a b")[0] == 7
    by_launch = recorded()
    names = {*AGENTS[name].variables(Target(script.url, NAME)), *AGENTS[name].removed}
    for got in (by_shell, by_launch):
        got["variables"] = {key: value for key, value in got["variables"].items() if key in names}
    assert by_shell == by_launch and by_launch["variables"]


def test_a_server_that_is_there_is_found(script, recorded, capsys, monkeypatch):
    monkeypatch.setattr(launch_command, "DEFAULT_URL", script.url)
    assert run(capsys, "launch", "claude")[0] == 7
    assert recorded()["variables"]["ANTHROPIC_BASE_URL"] == script.url


def test_a_server_is_started_for_another_model_and_ends_with_the_agent(script, recorded, capsys, monkeypatch):
    """The started server is real, and its model is not found: its last line is the command's."""
    monkeypatch.setattr(launch_command, "DEFAULT_URL", script.url)
    code, _, err = run(capsys, "launch", "claude", "--model", "./no/model")
    assert code == 2 and "'no/model' is not a directory" in err.splitlines()[-1]
    assert not (Path(os.environ["PATH"]).parent / "got").exists()


def test_refusals_are_one_line(script, recorded, capsys, monkeypatch):
    def refusal(*words):
        code, out, err = run(capsys, "launch", *words)
        assert code == 2 and out == "" and err.count("\n") == 1
        return err

    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr(launch_command, "DEFAULT_URL", nobody)
    assert f"no server answers at {nobody}: give --model, which is started, or --url" in refusal("claude")
    assert f"no server at {nobody} serves 'm'" in refusal("claude", "--model", "m", "--print")
    assert f"{nobody} does not answer" in refusal("claude", "--url", nobody)
    assert f"serves {NAME}, not 'other'" in refusal("claude", "--url", script.url, "--model", "other")
    assert "invalid choice: 'cursor'" in refusal("cursor")
    assert "unrecognized arguments: -p" in refusal("claude", "-p")
    monkeypatch.setenv("PATH", "/nowhere")
    assert refusal("opencode") == (
        "jmoe: opencode is not on PATH; https://opencode.ai/docs tells how to install opencode\n"
    )


def test_words_after_two_dashes_are_the_agents():
    assert split_forwarded(["launch", "claude", "--", "-p", "--", "x"]) == (
        ["launch", "claude"],
        ["-p", "--", "x"],
    )
    assert split_forwarded(["generate", "--", "x"]) == (["generate", "--", "x"], [])


def test_a_target_without_a_context_limits_nothing():
    target = Target("http://x", "m")
    assert "model_context_window" not in settings(list(launch_of(AGENTS["codex"], target, ()).words))
    config = launch_of(AGENTS["opencode"], target, ()).variables["OPENCODE_CONFIG_CONTENT"]
    assert "limit" not in json.loads(config)["provider"]["jmoe"]["models"]["m"]
