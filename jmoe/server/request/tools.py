"""Function tools: how an answer uses the tools of its request, and the grammar of a call.

If the request names the function, the answer is only its arguments. With "required" the model chooses, and
the answer is ``{"name": "...", "arguments": {...}}`` in exactly this spelling, so that it can be read while
it grows.
"""

import json
from dataclasses import dataclass
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


@dataclass(frozen=True)
class ToolUse:
    """How an answer uses tools: it is one call of one of ``functions``.

    functions: the functions that it may call.
    is_named: whether the request named the function, so that the answer is only its arguments.
    definitions: all tools of the request as they were sent, for the chat template.
    """

    functions: list[Function]
    is_named: bool
    definitions: list[dict[str, Any]]


def tool_use(body: ChatRequest) -> ToolUse | None:
    """How the answer uses tools; None if it must not call one. 400 if tools and tool_choice do not fit
    together or request something that is not supported."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice is only allowed with tools", "tool_choice")
        return None
    if choice in (None, "auto"):
        raise unsupported("tool_choice", AUTO)
    functions = [tool.function for tool in body.tools]
    names = [function.name for function in functions]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise invalid(f"tools: two functions are named {twice!r}", "tools")
    if choice == "none":
        return None
    definitions = [tool.source for tool in body.tools]
    if not isinstance(choice, NamedTool):
        return ToolUse(functions, is_named=False, definitions=definitions)
    name = choice.function.name
    if name not in names:
        raise invalid(f"tool_choice names {name[:64]!r}, which is none of the tools", "tool_choice")
    return ToolUse([functions[names.index(name)]], is_named=True, definitions=definitions)


def tools_grammar(tools: ToolUse) -> Grammar:
    """The grammar of an answer that is a call. ValueError if a function's parameters do not have the type
    "object"."""
    functions = tools.functions
    bounded([function.parameters for function in functions])
    if tools.is_named:
        return schema_grammar(_parameters(functions[0]))
    calls, rules, spaced = [], [], {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    for i, function in enumerate(functions):
        calls.append(f'{json.dumps(call_opening(function.name))} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {prepared(schema_grammar(spaced | _parameters(function)).text)}")
    return Grammar("lark", "\n".join([f"start: {' | '.join(calls)}", *rules, ""]))


def call_opening(name: str) -> str:
    """The text of a call before its arguments, if the model chooses the function."""
    return f'{{"name": "{name}", "arguments": '


def _parameters(function: Function) -> dict[str, Any]:
    schema = function.parameters or NO_ARGUMENTS
    if schema.get("type", "object") != "object":
        raise ValueError(f"the parameters of {function.name!r} must have the type 'object'")
    return {"type": "object"} | schema
