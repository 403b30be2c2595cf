"""The use of a request's tools in its answer: the functions that it may call, and the calls' dialect."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from jmoe.engine.grammar.grammar import Grammar
from jmoe.server.dialects.dialect import Dialect
from jmoe.server.dialects.events import Choice, Reader
from jmoe.server.dialects.json_call import JsonCall
from jmoe.server.errors import invalid, unsupported
from jmoe.server.request.schema import ChatRequest, Function, NamedTool

AUTO = (
    "tool_choice 'auto' (the default with tools) is not supported: calls are never guessed from free text. "
    "Give 'required', a named function or 'none'"
)
DIALECTS = {"json": JsonCall()}


@dataclass(frozen=True)
class ToolUse:
    """The way in which an answer uses tools.

    functions: functions that it may call.
    choice: what the request demands of it.
    definitions: all tools of the request as they were sent, for the chat template.
    dialect: how its calls are written.
    """

    functions: list[Function]
    choice: Choice
    definitions: list[dict[str, Any]]
    dialect: Dialect

    def grammar(self, open_names: Collection[str] = ()) -> Grammar | None:
        """Returns the grammar of the answer; None if it is free text.

        open_names: functions whose arguments are any object, unless they are strict.
        """
        return self.dialect.grammar(self.functions, self.choice, parallel=True, open_names=open_names)

    def mended(self, check: Callable[[Grammar], None]) -> Grammar:
        """Returns a grammar that ``check`` accepts after it has refused that of the tools as they are
        (``Followed.mended``)."""

        def make(open_names: Collection[str]) -> Grammar:
            made = self.grammar(open_names)
            assert made is not None
            return made

        return self.dialect.followed.mended(make, self.functions, check)

    def reader(self) -> Reader:
        """Returns a reader of one answer."""
        return self.dialect.reader(self.choice, self.functions)


def tool_use(body: ChatRequest) -> ToolUse | None:
    """Returns how the answer uses tools; None if it must not call one. It raises a 400 if tools and
    tool_choice do not fit together or request something that is not supported."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice is only allowed with tools", "tool_choice")
        return None
    kind = "named" if isinstance(choice, NamedTool) else choice or "auto"
    dialect = next((each for each in DIALECTS.values() if kind in each.choices), None)
    if dialect is None and kind != "none":
        raise unsupported("tool_choice", AUTO)
    functions = [tool.function for tool in body.tools]
    names = [function.name for function in functions]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise invalid(f"tools: two functions are named {twice!r}", "tools")
    if dialect is None or kind == "none":
        return None
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in names:
            raise invalid(f"tool_choice names {name[:64]!r}, which is none of the tools", "tool_choice")
        functions = [functions[names.index(name)]]
    return ToolUse(functions, kind, [tool.source for tool in body.tools], dialect)
