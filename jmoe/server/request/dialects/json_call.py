"""A call as JSON, which a grammar forces on a model of any kind.

If the request names the function, the answer is only its arguments. With "required" the model chooses, and
the answer is ``{"name": "...", "arguments": {...}}`` in exactly this spelling, so that it can be read while
it grows.
"""

import json
from collections.abc import Sequence
from typing import Any

from jmoe.engine.grammar.grammar import WHITESPACE, Grammar, schema_grammar
from jmoe.engine.grammar.json_schema import prepared
from jmoe.server.request.bounds import bounded
from jmoe.server.request.dialects.dialect import Arguments, CallEnd, CallStart, Choice, Dialect, Event
from jmoe.server.request.schema import Function

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def arguments_grammar(functions: Sequence[Function]) -> Grammar:
    """Returns the grammar of the arguments of the only function."""
    [function] = functions
    bounded(function.parameters)
    return schema_grammar(_parameters(function))


def call_grammar(functions: Sequence[Function]) -> Grammar:
    """Returns the grammar of a call of one of the functions."""
    bounded([function.parameters for function in functions])
    calls, rules, spaced = [], [], {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    for i, function in enumerate(functions):
        calls.append(f'{json.dumps(_opening(function.name))} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {prepared(schema_grammar(spaced | _parameters(function)).text)}")
    return Grammar("lark", "\n".join([f"start: {' | '.join(calls)}", *rules, ""]))


def _opening(name: str) -> str:
    """Returns the text of a call before its arguments, if the model chooses the function."""
    return f'{{"name": "{name}", "arguments": '


def _parameters(function: Function) -> dict[str, Any]:
    schema = function.parameters or NO_ARGUMENTS
    if schema.get("type", "object") != "object":
        raise ValueError(f"the parameters of {function.name!r} must have the type 'object'")
    return {"type": "object"} | schema


class CallReader:
    """Reads the one call of an answer, as its grammar spells it."""

    def __init__(self, choice: Choice, functions: Sequence[Function]):
        named = choice == "named"
        self.openings = {"" if named else _opening(each.name): each.name for each in functions}
        self.unread = ""  # the answer until the name is known
        self.has_begun = False
        self.depth, self.in_string, self.is_escaped, self.is_complete = 0, False, False, False

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        if not self.has_begun:
            self.unread += text
            opening = next((o for o in self.openings if self.unread.startswith(o)), None)
            if opening is None:
                return []
            self.has_begun, text = True, self.unread[len(opening) :]
            events.append(CallStart(self.openings[opening]))
        was_complete = self.is_complete
        if arguments := "".join(c for c in text if self._inside(c)):
            events.append(Arguments(arguments))
        if self.is_complete and not was_complete:
            events.append(CallEnd())
        return events

    def close(self) -> list[Event]:
        """Returns nothing: an answer cut before its function's name was whole has no call."""
        return []

    def _inside(self, c: str) -> bool:
        """Returns whether ``c`` belongs to the arguments; what follows their last brace closes the call."""
        inside = not self.is_complete
        if self.in_string:
            self.in_string = self.is_escaped or c != '"'
            self.is_escaped = c == "\\" and not self.is_escaped
        elif c == '"':
            self.in_string = True
        elif c in "{[":
            self.depth += 1
        elif c in "]}":
            self.depth -= 1
            self.is_complete = self.is_complete or self.depth <= 0
        return inside


DIALECT = Dialect("json", {"required": call_grammar, "named": arguments_grammar}, CallReader)
