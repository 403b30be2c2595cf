"""Tests ``jmoe chat`` against a scripted server: what is sent, what is shown, and what Ctrl-C leaves."""

import contextlib
import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from support.command_line import run
from support.server.scripted_chat import NAME, Scripted, serving

from jmoe.tools.chat import DIM, PLAIN, Conversation, Screen, chat
from jmoe.tools.chat_client import ChatClient, Refused, events

THOUGHTS = [{"role": "assistant"}, {"reasoning_content": "let me"}, {"reasoning_content": " see"}]
CALL = [
    {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "add", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
]
ON_TERMINAL = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "from jmoe.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


@contextlib.contextmanager
def _killed(process):
    try:
        yield
    finally:
        process.kill()


@pytest.fixture
def script():
    with serving(Scripted()) as script:
        yield script


def talk(script, lines, *, is_terminal, **given):
    """Returns the exit code, what was shown, and the conversation."""
    out, left = io.StringIO(), [*lines]

    def read() -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    conversation = Conversation({"model": NAME}, **given)
    code = chat(
        ChatClient(script.url), conversation, read, Screen(out, is_terminal=is_terminal, has_colours=True)
    )
    return code, out.getvalue(), conversation


def test_an_answer_is_sent_back_as_history(script):
    script.answers += [[{"content": "one"}, {"content": " two"}], [{"content": "three"}]]
    code, out, _ = talk(script, ["Hi", "", "more"], is_terminal=False, system="Be brief.")
    assert (code, out) == (0, "one two\nthree\n")
    turns = ["Be brief.", "Hi", "one two", "more"]
    roles = ["system", "user", "assistant", "user"]
    assert script.bodies[0]["stream"] is True and script.bodies[0]["model"] == NAME
    assert script.bodies[1]["messages"] == [
        {"role": role, "content": text} for role, text in zip(roles, turns, strict=True)
    ]


def test_a_terminal_shows_thoughts_dimmed_and_calls(script):
    script.answers.append([*THOUGHTS, {"content": "It is 2"}, *CALL])
    _, out, conversation = talk(script, ["1+1?"], is_terminal=True)
    assert f'{DIM}let me see{PLAIN}\nIt is 2{DIM}\ncall add {{"a": 1}}{PLAIN}\n' in out
    assert conversation.messages[-1] == {"role": "assistant", "content": "It is 2"}


def test_a_pipe_gets_the_answer_alone(script):
    script.answers.append([*THOUGHTS, {"content": "It is 2"}, *CALL])
    assert talk(script, ["1+1?"], is_terminal=False)[1] == "It is 2\n"


def test_an_answer_cannot_command_the_terminal(script):
    script.answers.append([{"content": "a\x1b]0;title\x07\x9b31mb\tc\n"}])
    assert talk(script, ["x"], is_terminal=False)[1] == "a\ufffd]0;title\ufffd\ufffd31mb\tc\n\n"


def test_commands(script):
    script.answers += [[{"content": "a"}], [{"content": "b"}], [{"content": "c"}]]
    lines = ["x", "/exact", "y", "/reset", "/exact", "z", "/help", "/bogus", "/quit", "never"]
    _, out, _ = talk(script, lines, is_terminal=True)
    assert [body.get("moe") for body in script.bodies] == [None, {"exact": True}, None]
    assert [len(body["messages"]) for body in script.bodies] == [1, 3, 1]
    assert "unknown command '/bogus'" in out and out.count("/reset  begin anew") == 2


def test_a_refused_turn_is_taken_back(script, capsys):
    script.answers += [503, [{"content": "half"}, {"error": {"message": "engine\ndied"}}], [{"content": "b"}]]
    code, _, conversation = talk(script, ["x", "y", "z"], is_terminal=True)
    error = capsys.readouterr().err
    assert code == 0 and error == f"jmoe: {script.url} answered 503: not now\njmoe: engine died\n"
    assert [turn["content"] for turn in conversation.messages] == ["z", "b"]
    script.answers.append(503)
    assert talk(script, ["x", "never"], is_terminal=False)[0] == 2


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(script):
    """A whole ``jmoe chat`` on a terminal of its own."""
    script.answers += [[{"content": "so far"}, None], [{"content": "the end"}]]
    terminal, inner = pty.openpty()
    words = [sys.executable, "-c", ON_TERMINAL, "chat", script.url, "--api-key", "key"]
    environment = os.environ | {"TERM": "dumb", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        subprocess.Popen(
            words, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
        ) as process,
        _killed(process),
    ):
        os.close(inner)
        shown = ""

        def until(text: str) -> None:
            nonlocal shown
            while text not in shown:
                assert select.select([terminal], [], [], 20)[0], f"{text!r} is missing after {shown!r}"
                shown += os.read(terminal, 1000).decode()
            shown = shown.partition(text)[2]

        until("> ")
        os.write(terminal, b"first\n")
        until("so far")
        os.write(terminal, b"\x03")
        until("[stopped]")
        assert script.left.wait(20), "the server must learn that nobody waits"
        until("> ")
        os.write(terminal, b"second\n")
        until("the end")
        until("> ")
        os.write(terminal, b"\x04")
        assert process.wait(20) == 0
    os.close(terminal)
    texts = [turn["content"] for turn in script.bodies[1]["messages"]]
    assert texts == ["first", "so far", "second"] and set(script.keys) == {"Bearer key"}


def test_the_command_in_a_pipe(script, capsys, monkeypatch):
    script.answers.append([{"content": "yes"}])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is it?\n"))
    code, out, err = run(
        capsys, "chat", f"{script.url}/v1/", "--max-tokens", "9", "--temperature", "0.5", "--exact"
    )
    assert (code, out, err) == (0, "yes\n", "")
    body = script.bodies[0]
    assert (body["max_tokens"], body["temperature"], body["moe"]) == (9, 0.5, {"exact": True})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["http://127.0.0.1:1"], "http://127.0.0.1:1 does not answer: "),
        (["ftp://x"], "'ftp://x' is not a URL such as http://127.0.0.1:8000"),
        (["http://x:port"], "'http://x:port' is not a URL"),
        (
            ["http://x", "--dtype", "float32"],
            "--dtype is for a model that is started here, and http://x runs",
        ),
        (["tiny", "--api-key", "k"], "--api-key is for the server at a URL, and 'tiny' is not one"),
        (["./no/such"], "'no/such' is not a directory"),
    ],
)
def test_refusals_are_one_line(capsys, argv, message):
    code, out, err = run(capsys, "chat", *argv)
    assert code == 2 and out == "" and message in err and "Traceback" not in err
    assert [line for line in err.splitlines() if not line.endswith("...")] == [err.splitlines()[-1]]


def test_events_of_several_lines_and_damaged_ones():
    lines = [
        b": x\n",
        b"event: a\n",
        b'data: {"a":\n',
        b"data:1}\n",
        b"\n",
        b"data: 5\n",
        b"\n",
        b"data: [DONE]\n",
        b"\n",
    ]
    assert list(events(iter(lines))) == [{"a": 1}]
    with pytest.raises(Refused, match=r"an event of the answer is not JSON: \{"):
        list(events(iter([b"data: {\n", b"\n"])))


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from jmoe.cli.main import main\n"
        "main(['chat', 'http://127.0.0.1:1'])\n"
        "assert not {'jax', 'numpy', 'httpx', 'starlette', 'huggingface_hub'} & set(sys.modules)"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    assert time.monotonic() - start < 60
