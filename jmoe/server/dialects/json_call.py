"""A call as JSON, which a grammar forces on a model of any kind.

If the request names the function, the answer is only its arguments. With "required" the model chooses, and
the answer is ``{"name": "...", "arguments": {...}}`` in exactly this spelling, so that it can be read while
it grows.
"""

import json
from collections.abc import Mapping, Sequence

from jmoe.engine.grammar.grammar import Grammar
from jmoe.server.dialects.events import Arguments, CallEnd, CallStart, Choice, Event, Function
from jmoe.server.dialects.grammars.schemas import Followed
from jmoe.server.dialects.ids import letters
from jmoe.server.dialects.reading.arguments import OUTSIDE, Extent
from jmoe.server.dialects.rules import AnswerRules


class JsonCall:
    """The dialect of models whose templates show no tools (``dialect.Dialect``)."""

    name = "json"
    choices = frozenset[Choice](("required", "named"))
    marks: Mapping[int, str] = {}
    call_start = ""

    def __init__(self) -> None:
        self.followed = Followed()

    def grammar(self, rules: AnswerRules) -> Grammar | None:
        """Returns the grammar of one call, so the rules for several and for text have no effect."""
        calls, lines = [], []
        for i, function in enumerate(rules.functions):
            calls.append(f'{json.dumps(_opening(function.name))} arguments_{i} "}}"')
            parameters = self.followed.parameters(function, rules.open_names)
            lines.append(f"arguments_{i}: %json {parameters.json()}")
        start = "arguments_0" if rules.choice == "named" else " | ".join(calls)
        return Grammar("lark", "\n".join([f"start: {start}", *lines, ""]))

    def around(self, answer: Grammar) -> Grammar:
        return answer

    def reader(self, choice: Choice, functions: Sequence[Function]) -> "CallReader":
        return CallReader(choice, functions)

    def new_id(self, name: str, number: int) -> str:
        return letters()


def _opening(name: str) -> str:
    """Returns the text of a call before its arguments, if the model chooses the function."""
    return f'{{"name": "{name}", "arguments": '


class CallReader:
    """Reads the one call of an answer, as its grammar spells it."""

    def __init__(self, choice: Choice, functions: Sequence[Function]):
        named = choice == "named"
        self.openings = {"" if named else _opening(each.name): each.name for each in functions}
        self.unread = ""  # the answer until the name is known
        self.has_begun, self.is_complete = False, False
        self.extent = Extent(OUTSIDE)

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self.is_complete:  # what follows the last brace closes the call
            return []
        if not self.has_begun:
            self.unread += text
            opening = next((o for o in self.openings if self.unread.startswith(o)), None)
            if opening is None:
                return []
            self.has_begun, text = True, self.unread[len(opening) :]
            events.append(CallStart(self.openings[opening]))
        end = self.extent.end(text, 0)
        self.is_complete = end >= 0
        if arguments := text[: end + 1] if self.is_complete else text:
            events.append(Arguments(arguments))
        if self.is_complete:
            events.append(CallEnd())
        return events

    def close(self) -> list[Event]:
        """Returns nothing: an answer cut before its function's name was whole has no call."""
        return []
