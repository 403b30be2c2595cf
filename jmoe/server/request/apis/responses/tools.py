"""The tools of the Responses API as functions of a chat."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from jmoe.server.errors import invalid
from jmoe.server.request.apis.conversion import Open, function_tool, named_function
from jmoe.server.request.apis.notices import Notices
from jmoe.server.request.decoding import converted
from jmoe.server.request.schema import GrammarText

SEPARATOR = "__"  # between a namespace and a function of it
INPUT = "input"  # the only argument of a custom tool
LongName = Annotated[str, Meta(min_length=1, max_length=128)]


class FlatFunction(Open, kw_only=True):
    name: LongName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomFormat(Open, kw_only=True):
    """syntax, definition: of a grammar only."""

    type: Literal["text", "grammar"] = "text"
    syntax: Literal["lark", "regex"] | None = None
    definition: GrammarText | None = None


class CustomTool(Open, kw_only=True):
    """A tool whose only argument is a text."""

    name: LongName
    description: str | None = None
    format: CustomFormat | None = None


class Namespace(Open, kw_only=True):
    name: LongName
    tools: list[dict[str, Any]]


@dataclass(frozen=True)
class ToolName:
    """The names of a tool as a client knows it.

    name: name of the tool.
    namespace: namespace that it is in; None if it is in none.
    is_custom: whether its argument is a text.
    """

    name: str
    namespace: str | None = None
    is_custom: bool = False

    @property
    def function(self) -> str:
        """The name of the function in the chat."""
        return self.name if self.namespace is None else f"{self.namespace}{SEPARATOR}{self.name}"


@dataclass
class FlatTools:
    """The functions of a chat.

    functions: tools of the chat request.
    names: what the client calls each function, by the function's name.
    left_out: types of the tools that are no functions.
    """

    functions: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, ToolName] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def add(self, tool: dict[str, Any], where: str, namespace: str | None = None) -> None:
        """Adds a tool of the request; a namespace adds the tools in it."""
        kind = tool.get("type")
        if kind == "function":
            flat = converted(tool, FlatFunction, where)
            name = ToolName(flat.name, namespace)
            made = function_tool(name.function, flat.description, flat.parameters, flat.strict)
        elif kind == "custom":
            custom = converted(tool, CustomTool, where)
            name = ToolName(custom.name, namespace, is_custom=True)
            made = _custom_function(name, custom, where)
        elif kind == "namespace" and namespace is None:
            inner = converted(tool, Namespace, where)
            for i, each in enumerate(inner.tools):
                self.add(each, f"{where}.tools[{i}]", inner.name)
            return
        elif isinstance(kind, str):
            self.left_out.add(kind)
            return
        else:
            raise invalid(f"{where}.type is required", f"{where}.type", "missing_required_parameter")
        self.functions.append(made)
        self.names[name.function] = name

    def choice(self, choice: str | dict[str, Any] | None) -> "Choice":
        """Returns what ``tool_choice`` means for the functions."""
        if choice is None or isinstance(choice, str):
            if choice not in (None, "none", "auto", "required"):
                raise invalid("tool_choice must be 'none', 'auto', 'required' or an object", "tool_choice")
            has_any = bool(self.functions) or choice == "required"
            return Choice(self.functions, choice if has_any else None)
        if choice.get("type") == "allowed_tools":
            return self._allowed(choice)
        return Choice(self.functions, named_function(self._named(choice, "tool_choice")))

    def _allowed(self, choice: dict[str, Any]) -> "Choice":
        mode, tools = choice.get("mode", "auto"), choice.get("tools")
        if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
            message = "tool_choice of allowed_tools needs mode 'auto' or 'required', and tools"
            raise invalid(message, "tool_choice")
        where = "tool_choice.tools[{}]".format
        allowed = {self._named(tool, where(i)) for i, tool in enumerate(tools) if not self._is_left_out(tool)}
        if not allowed:  # all of them are left out
            raise invalid("tool_choice allows no tool that can be called here", "tool_choice")
        chosen = {"mode": mode, "tools": [named_function(name) for name in sorted(allowed)]}
        return Choice(self.functions, {"type": "allowed_tools", "allowed_tools": chosen})

    def _is_left_out(self, tool: Any) -> bool:
        return isinstance(tool, dict) and tool.get("type") in self.left_out

    def _named(self, choice: Any, where: str) -> str:
        """Returns the function that an object with a type and a name means."""
        kind = choice.get("type") if isinstance(choice, dict) else None
        if kind not in ("function", "custom"):
            raise invalid(f"{where}: a tool of type {str(kind)[:64]!r} cannot be called here", where)
        name = choice.get("name")
        matches = (each.function for each in self.names.values() if name in (each.name, each.function))
        found = next(matches, None)
        if found is None:
            raise invalid(f"{where} names {str(name)[:64]!r}, which is none of the tools", where)
        return found


@dataclass(frozen=True)
class Choice:
    """The functions that the chat gets, and its ``tool_choice``."""

    functions: list[dict[str, Any]]
    choice: Any


def flat_tools(tools: list[dict[str, Any]], notices: Notices) -> FlatTools:
    flat = FlatTools()
    for i, tool in enumerate(tools):
        flat.add(tool, f"tools[{i}]")
    for kind in sorted(flat.left_out):
        notices.tell_once(f"/v1/responses: tools of type {kind[:64]!r} are not known here and are left out")
    return flat


def custom_arguments(text: str) -> str:
    """Returns the arguments of a call of a custom tool."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


def _custom_function(name: ToolName, tool: CustomTool, where: str) -> dict[str, Any]:
    """Returns a function of one text. A regular expression is part of its schema; a Lark grammar, which no
    schema can hold, is shown to the model in the description."""
    text: dict[str, Any] = {"type": "string"}
    description, form = tool.description, tool.format
    if form is not None and form.type == "grammar":
        if form.syntax is None or form.definition is None:
            raise invalid(f"{where}.format needs syntax and definition", f"{where}.format")
        if form.syntax == "regex":
            text["pattern"] = f"^(?:{form.definition})$"
        else:
            grammar = f"The input follows this Lark grammar:\n{form.definition}"
            description = grammar if not description else f"{description}\n\n{grammar}"
    schema = {
        "type": "object",
        "properties": {INPUT: text},
        "required": [INPUT],
        "additionalProperties": False,
    }
    return function_tool(name.function, description, schema, None)
