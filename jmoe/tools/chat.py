"""``jmoe chat``: a conversation in a terminal, or through a pipe."""

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TextIO

from jmoe.tools.chat_client import ChatClient, Refused

HELP = """/reset  begin anew      /exact  routing without lossy techniques, on or off
/help   this text       /quit   end, as the end of input does; Ctrl-C ends an answer"""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# Control characters of an answer could command the terminal; line ends and tabs stay.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass
class Conversation:
    """The turns so far, and the fields of each request.

    fields: fields of a body besides its messages, such as ``model``.
    system: text of the system turn; "" without one.
    is_exact: whether requests opt out of lossy techniques.
    messages: turns of the user and the model.
    """

    fields: dict[str, Any]
    system: str = ""
    is_exact: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        exact = {"moe": {"exact": True}} if self.is_exact else {}
        return {**self.fields, "messages": system + self.messages} | exact


class Screen:
    """The output of a conversation. Only a terminal shows thoughts, dimmed, calls and remarks: a pipe gets
    the answers alone.

    has_colours: whether thoughts may be dimmed.
    """

    def __init__(self, out: TextIO, *, is_terminal: bool, has_colours: bool):
        self.out, self.is_terminal, self.has_colours = out, is_terminal, has_colours and is_terminal
        self._is_dim = self._has_text = self._is_line_open = False

    def text(self, text: str) -> None:
        """Shows a piece of the answer."""
        if self._is_dim:
            self._set_dim(False)
            if self._is_line_open:
                self._write("\n")
        self._write(text)

    def aside(self, text: str) -> None:
        """Shows a piece of thoughts or of a call."""
        if self.is_terminal:
            self._set_dim(True)
            self._write(text)

    def end(self, remark: str = "") -> None:
        """Ends an answer with a line end."""
        self._set_dim(False)
        print(f" [{remark}]" if remark and self.is_terminal else "", file=self.out, flush=True)
        self._is_line_open = False

    def remark(self, text: str) -> None:
        if self.is_terminal:
            print(text, file=self.out, flush=True)

    def _set_dim(self, is_dim: bool) -> None:
        if is_dim != self._is_dim and self.has_colours:
            print(DIM if is_dim else PLAIN, end="", file=self.out)
        self._is_dim = is_dim

    def _write(self, text: str) -> None:
        print(text.translate(CONTROLS), end="", file=self.out, flush=True)
        self._is_line_open = not text.endswith("\n") if text else self._is_line_open


def chat(client: ChatClient, talk: Conversation, read: Callable[[], str], screen: Screen) -> int:
    """Holds a conversation until the input ends. It returns the exit code: 2 if the server refused a turn of
    a pipe, of which the rest is then not sent; on a terminal the turn is taken back.

    read: function that returns a line of the user; it raises EOFError at the end.
    """
    screen.remark(f"{talk.fields.get('model', 'the server')} at {client.url}; /help tells the commands")
    while True:
        try:
            line = read().strip()
        except EOFError:
            screen.remark("")
            return 0
        except KeyboardInterrupt:
            if not screen.is_terminal:
                raise
            screen.remark("\n(/quit or the end of input ends)")
            continue
        if line == "/quit":
            return 0
        if line.startswith("/"):
            screen.remark(command(line, talk))
        elif line:
            try:
                turn(client, talk, line, screen)
            except Refused as error:
                talk.messages.pop()
                print(f"jmoe: {error}", file=sys.stderr)
                if not screen.is_terminal:
                    return 2


def command(line: str, talk: Conversation) -> str:
    """Does what a line with a slash says; returns what to tell."""
    if line == "/reset":
        talk.messages.clear()
        return "a new conversation"
    if line == "/exact":
        talk.is_exact = not talk.is_exact
        return "exact: no lossy technique changes the answers" if talk.is_exact else "as the server is set"
    return HELP if line == "/help" else f"unknown command {line!r}\n{HELP}"


def turn(client: ChatClient, talk: Conversation, line: str, screen: Screen) -> None:
    """Sends a line and shows the answer, both of which become turns. Ctrl-C ends the answer, of which the
    part so far stays in the conversation. It raises Refused as ``ChatClient.stream`` does."""
    talk.messages.append({"role": "user", "content": line})
    parts: list[str] = []
    calls: set[int] = set()
    remark = ""
    try:
        with closing(client.stream(talk.body())) as deltas:
            for delta in deltas:
                if thought := delta.get("reasoning_content") or delta.get("reasoning"):
                    screen.aside(thought)
                if text := delta.get("content"):
                    parts.append(text)
                    screen.text(text)
                for call in delta.get("tool_calls") or ():
                    screen.aside(_call_text(call, calls))
    except KeyboardInterrupt:
        remark = "stopped"
    except Refused:
        screen.end()
        raise
    screen.end(remark)
    talk.messages.append({"role": "assistant", "content": "".join(parts)})


def _call_text(call: dict[str, Any], begun: set[int]) -> str:
    """Returns a piece of a call as it is shown: its name on a line of its own, then its arguments."""
    function, index = call.get("function") or {}, call.get("index", 0)
    name = ""
    if index not in begun:
        begun.add(index)
        name = f"\ncall {function.get('name', '')} "
    return name + (function.get("arguments") or "")
