"""The use of a request's tools in its answer: the functions that it may call, and the calls' dialect."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from jmoe.engine.grammar.grammar import Grammar
from jmoe.server.dialects.dialect import Dialect
from jmoe.server.dialects.events import Choice, Reader
from jmoe.server.dialects.json_call import JsonCall
from jmoe.server.dialects.rules import AnswerRules
from jmoe.server.errors import invalid, unsupported
from jmoe.server.request.fields.chat import AllowedTools, Function, Message, NamedTool
from jmoe.server.request.schema import ChatRequest


@dataclass(frozen=True)
class ToolSupport:
    """The way in which a model's answers call functions.

    dialect: dialect of the model's own calls; None if it has none.
    why: reason for that, in words.
    has_definitions: whether the prompt shows the tools to the model.
    forced: dialect of calls that a grammar forces on any model.
    """

    dialect: Dialect | None
    why: str
    has_definitions: bool
    forced: Dialect = field(default_factory=JsonCall)

    @property
    def refusal(self) -> str | None:
        """The reason why calls cannot come in free text; None if they can."""
        if self.dialect is None:
            return self.why
        return None if self.has_definitions else "the chat template does not show tools to the model"


@dataclass(frozen=True)
class ToolUse:
    """The way in which an answer uses tools.

    functions: functions that it may call.
    choice: what the request demands of it.
    definitions: all tools of the request as they were sent, for the chat template.
    dialect: how its calls are written.
    is_parallel: whether it may have several calls.
    num_calls: number of calls in the conversation before it.
    answer: grammar of its text if it calls nothing; None = any text.
    """

    functions: list[Function]
    choice: Choice
    definitions: list[dict[str, Any]]
    dialect: Dialect
    is_parallel: bool = True
    num_calls: int = 0
    answer: Grammar | None = None

    def grammar(self, open_names: Collection[str] = ()) -> Grammar | None:
        """Returns the grammar of the answer; None if it is free text.

        open_names: functions whose arguments are any object, unless they are strict.
        """
        rules = AnswerRules(self.functions, self.choice, self.is_parallel, open_names, self.answer)
        return self.dialect.grammar(rules)

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

    def new_id(self, name: str, number: int) -> str:
        """Returns an id for a call of the answer.

        name: name of the function.
        number: number of calls in the answer before it.
        """
        return self.dialect.new_id(name, self.num_calls + number)


def tool_use(body: ChatRequest, support: ToolSupport) -> ToolUse | None:
    """Returns how the answer uses tools; None if it must not call one. It raises a 400 if tools and
    tool_choice do not fit together or request something that is not supported.

    support: how the model's answers call functions.
    """
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice is only allowed with tools", "tool_choice")
        return None
    functions = [tool.function for tool in body.tools]
    names = [function.name for function in functions]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise invalid(f"tools: two functions are named {twice!r}", "tools")
    if choice == "none":
        return None
    kind, called = _choice(body, names)
    return ToolUse(
        functions=[functions[names.index(name)] for name in called],
        choice=kind,
        definitions=[tool.source for tool in body.tools],
        dialect=_dialect(kind, support),
        is_parallel=body.parallel_tool_calls is not False,
        num_calls=num_calls(body.messages),
    )


def num_calls(messages: Sequence[Message]) -> int:
    """Returns the number of calls in a conversation."""
    return sum(len(message.tool_calls or ()) for message in messages)


def _choice(body: ChatRequest, names: list[str]) -> tuple[Choice, list[str]]:
    """Returns what the request demands, and the names of the functions that may be called."""
    choice = body.tool_choice
    match choice:
        case NamedTool():
            kind, called = "named", [choice.function.name]
        case AllowedTools():
            kind, called = (
                choice.allowed_tools.mode,
                [tool.function.name for tool in choice.allowed_tools.tools],
            )
        case _:
            return ("required" if choice == "required" else "auto"), names
    unknown = next((name for name in called if name not in names), None)
    if unknown is not None:
        raise invalid(f"tool_choice names {unknown[:64]!r}, which is none of the tools", "tool_choice")
    return kind, [name for name in names if name in called]


def _dialect(kind: Choice, support: ToolSupport) -> Dialect:
    """Returns the dialect of the answer's calls. JSON can be forced on a model of any kind."""
    refusal = support.refusal
    if support.dialect is not None and refusal is None and kind in support.dialect.choices:
        return support.dialect
    if kind == "auto":
        message = f"tool_choice 'auto' (the default with tools) is not possible with this model: {refusal}. "
        raise unsupported("tool_choice", f"{message}Give 'required', a named function or 'none'")
    return support.forced
