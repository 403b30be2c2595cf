"""A fake engine whose answers are written beforehand, with thoughts and calls in a form of the tests' own."""

import re
from dataclasses import dataclass
from typing import Any

from support.server.fake_engine import EOS, ByteCodec, FakeEngine, served

from jmoe.engine.text.markup import Markup
from jmoe.server.dialects.events import Arguments, CallEnd, CallStart, PlainText
from jmoe.server.request.fields.chat import AllowedTools
from jmoe.server.request.tools import tool_use

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content | map(attribute='text') | join('|') }}{% endif %}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments }}]"
    "{% endfor %}{{ '\\n' }}{% endfor %}a:"
)
CALL = re.compile(r"<call>(\w+)(.*?)</call>", re.S)


class ScriptedEngine(FakeEngine):
    """Answers each request with the next of ``scripts``, byte by byte, and then ends the text. Thoughts stand
    between <think> and </think>."""

    def __init__(self, *scripts: str, **facts):
        super().__init__(ByteCodec(), **{"max_model_len": 4096, **facts})
        self.scripts = [[*script.encode(), EOS] for script in scripts]
        self.script_of: dict[str, list[int]] = {}

    def submit(self, requests):
        for request in requests:
            request.markup = Markup(thought_start="<think>", thought_end="</think>")
            self.script_of[request.id] = self.scripts.pop(0)
        super().submit(requests)

    def _wanted(self, request, done):
        return self.script_of[request.id][done]

    def prompt(self, number=-1):
        """Returns the text of a prompt."""
        return ByteCodec().decode(self.seen[number].prompt_token_ids)


class ScriptReader:
    """Reads calls of the form <call>NAME{...}</call>: a call when it ends, or the answer does."""

    def __init__(self):
        self.unread = ""

    def feed(self, text):
        self.unread += text
        events = []
        while (found := CALL.search(self.unread)) is not None:
            events += [PlainText(self.unread[: found.start()])] if found.start() else []
            half = len(found[2]) // 2
            events += [CallStart(found[1]), Arguments(found[2][:half]), Arguments(found[2][half:]), CallEnd()]
            self.unread = self.unread[found.end() :]
        start = self.unread.find("<")
        free, self.unread = (self.unread, "") if start < 0 else (self.unread[:start], self.unread[start:])
        return [*events, *([PlainText(free)] if free else [])]

    def close(self):
        name, _, arguments = self.unread.removeprefix("<call>").partition("{")
        return [CallStart(name), Arguments("{" + arguments)] if arguments else []


@dataclass(frozen=True)
class FreeCalls:
    """A use of tools without a grammar, for any ``tool_choice``."""

    functions: list[Any]
    definitions: list[dict[str, Any]]
    choice: str
    body: Any
    dialect: Any
    is_parallel: bool = True
    mended: None = None
    answer: Any = None

    def grammar(self, open_names=()):
        return None

    def new_id(self, name, number):
        return f"{name}-{number}"

    def reader(self):
        return ScriptReader()


def free_calls(monkeypatch):
    """Makes the answers of the scripts the calls of every request with tools; returns the requests' uses."""
    uses = []

    def use(body, support):
        choice = body.tool_choice
        if not body.tools or choice == "none":
            return tool_use(body, support)
        functions = [tool.function for tool in body.tools]
        kind = choice if isinstance(choice, str) else "auto" if choice is None else "named"
        if isinstance(choice, AllowedTools):
            allowed = {tool.function.name for tool in choice.allowed_tools.tools}
            functions = [each for each in functions if each.name in allowed]
            kind = choice.allowed_tools.mode
        uses.append(FreeCalls(functions, [tool.source for tool in body.tools], kind, body, support.forced))
        return uses[-1]

    monkeypatch.setattr("jmoe.server.request.checks.tool_use", use)
    return uses


def serving(directory, monkeypatch):
    """Yields a function that serves scripts to a client, for a fixture.

    directory: folder for the chat template.
    """
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    uses, contexts = free_calls(monkeypatch), []

    def start(*scripts, settings=None, **facts):
        engine = ScriptedEngine(*scripts, **facts)
        contexts.append(served(engine, directory=directory, **settings or {}))
        client = contexts[-1].__enter__()
        client.uses = uses
        return client

    yield start
    for context in contexts:
        context.__exit__(None, None, None)
