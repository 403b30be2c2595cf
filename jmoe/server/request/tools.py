"""Function tools: the checks of a request's tools, the grammar of a call, and the reader of a call's text.

If the request names the function, the answer is only its arguments. With "required" the model chooses, and
the answer is ``{"name": "...", "arguments": {...}}`` in exactly this spelling, so that it can be read while
it grows.
"""

import json
from typing import Any

from jmoe.engine.grammar.grammar import WHITESPACE, Grammar, schema_grammar
from jmoe.engine.grammar.json_schema import prepared
from jmoe.server.errors import invalid, unsupported
from jmoe.server.request.bounds import bounded
from jmoe.server.request.schema import ChatRequest, Function, NamedTool

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
AUTO = (
    "tool_choice 'auto' (the default with tools) is not supported: calls are never guessed from free text. "
    "Give 'required', a named function or 'none'"
)


def check_tools(body: ChatRequest) -> None:
    """400 if tools and tool_choice do not fit together or request something that is not supported."""
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise invalid("tool_choice is only allowed with tools", "tool_choice")
        return
    if body.tool_choice in (None, "auto"):
        raise unsupported("tool_choice", AUTO)
    names = [tool.function.name for tool in body.tools]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise invalid(f"tools: two functions are named {twice!r}", "tools")
    if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in names:
        name = body.tool_choice.function.name[:64]
        raise invalid(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")


def forced_tools(body: ChatRequest) -> list[Function]:
    """The functions of which the answer must call one: none, the named one or all."""
    functions = [tool.function for tool in body.tools or ()]
    if isinstance(body.tool_choice, NamedTool):
        return [f for f in functions if f.name == body.tool_choice.function.name]
    return functions if body.tool_choice == "required" else []


def tools_grammar(body: ChatRequest) -> Grammar:
    """The grammar of an answer that calls one of ``forced_tools``. ValueError if a function's parameters do
    not have the type "object"."""
    functions = forced_tools(body)
    bounded([function.parameters for function in functions])
    if isinstance(body.tool_choice, NamedTool):
        return schema_grammar(_parameters(functions[0]))
    calls, rules, spaced = [], [], {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    for i, function in enumerate(functions):
        calls.append(f'{json.dumps(_opening(function.name))} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {prepared(schema_grammar(spaced | _parameters(function)).text)}")
    return Grammar("lark", "\n".join([f"start: {' | '.join(calls)}", *rules, ""]))


def plain_tools(body: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools as they were sent, for the chat template; None if the answer must not call one."""
    return None if not forced_tools(body) else [tool.sent for tool in body.tools or ()]


def _parameters(function: Function) -> dict[str, Any]:
    schema = function.parameters or NO_ARGUMENTS
    if schema.get("type", "object") != "object":
        raise ValueError(f"the parameters of {function.name!r} must have the type 'object'")
    return {"type": "object"} | schema


def _opening(name: str) -> str:
    return f'{{"name": "{name}", "arguments": '


class CallReader:
    """Reads one call from the pieces of an answer.

    functions: functions that may be called.
    named: whether the request named the function, so that the answer is only its arguments.
    name: name of the called function; None until it is known.
    """

    def __init__(self, functions: list[Function], named: bool):
        self.openings = {_opening(f.name): f.name for f in functions}
        self.name = functions[0].name if named else None
        self.text = ""
        self.depth, self.in_string, self.escaped, self.ended = 0, False, False, False

    def feed(self, text: str) -> str:
        """Takes the answer's next text and returns the part of it that belongs to the arguments."""
        if self.name is None:
            self.text += text
            opening = next((o for o in self.openings if self.text.startswith(o)), None)
            if opening is None:
                return ""
            self.name, text = self.openings[opening], self.text[len(opening) :]
        return "".join(c for c in text if self._inside(c))

    def _inside(self, c: str) -> bool:
        """Whether ``c`` belongs to the arguments; what follows their last brace closes the call."""
        inside = not self.ended
        if self.in_string:
            self.in_string = self.escaped or c != '"'
            self.escaped = c == "\\" and not self.escaped
        elif c == '"':
            self.in_string = True
        elif c in "{[":
            self.depth += 1
        elif c in "]}":
            self.depth -= 1
            self.ended = self.ended or self.depth <= 0
        return inside
