"""The dialect of a checkpoint whose ``response_template`` is none of the known formats.

Its answers are free text, and its calls are told when the answer is whole.
"""

import json
from collections.abc import Mapping, Sequence

from jmoe.engine.grammar.grammar import Grammar
from jmoe.server.dialects.events import (
    Arguments,
    CallEnd,
    CallStart,
    Choice,
    Event,
    Function,
    PlainText,
    Reader,
)
from jmoe.server.dialects.grammars.schemas import Followed
from jmoe.server.dialects.ids import letters
from jmoe.server.dialects.marks import FIRST
from jmoe.server.dialects.response_template import ResponseTemplate
from jmoe.server.dialects.rules import AnswerRules


class TemplateDialect:
    """A template over one tokenizer (``dialect.Dialect``).

    tokens: result of ``marks.apart_tokens``.
    """

    name = "response_template"
    choices = frozenset[Choice](("auto",))
    call_start = ""

    def __init__(self, template: ResponseTemplate, tokens: Mapping[str, int]):
        self.template, self.followed = template, Followed()
        found = [name for name in tokens if name in template.anchors]
        self.names = {chr(FIRST + i): name for i, name in enumerate(found)}
        self.marks = {tokens[name]: mark for mark, name in self.names.items()}

    def grammar(self, rules: AnswerRules) -> Grammar | None:
        """Returns None: the answer is free text. Raises ValueError if its text has a form."""
        if rules.answer is not None:
            raise ValueError(
                f"calls by the checkpoint's {self.name} cannot be joined with a form of the text"
            )
        return None

    def around(self, answer: Grammar) -> Grammar:
        return answer

    def reader(self, choice: Choice, functions: Sequence[Function]) -> Reader:
        return WholeReader(self.template, self.names)

    def new_id(self, name: str, number: int) -> str:
        return letters()


class WholeReader:
    """Reads an answer once it is whole (``events.Reader``). What cannot be read is text.

    names: names of the tokens that stand in the text as private characters, by character.
    """

    def __init__(self, template: ResponseTemplate, names: Mapping[str, str]):
        self.template, self.names, self.parts = template, names, list[str]()

    def feed(self, text: str) -> list[Event]:
        self.parts.append(text)
        return []

    def close(self) -> list[Event]:
        given = "".join(self.parts)
        answer = given.translate(str.maketrans(dict(self.names)))
        try:
            text, calls = self.template.read(answer)
        except (ValueError, KeyError, TypeError):
            text, calls = answer, []
        text = text.strip() if calls else given.translate(dict.fromkeys(map(ord, self.names)))
        events: list[Event] = [PlainText(text)] if text else []
        for name, values in calls:
            arguments = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
            events += [CallStart(name), Arguments(arguments), CallEnd()]
        return events
