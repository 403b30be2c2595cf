"""The rules that an answer with tools must follow, from which a dialect makes its grammar."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jmoe.engine.grammar.grammar import Grammar
from jmoe.server.dialects.events import Choice, Function


@dataclass(frozen=True)
class AnswerRules:
    """The rules of one answer.

    functions: functions that it may call.
    choice: what the request demands of it.
    is_parallel: whether it may have several calls.
    open_names: functions whose arguments are any object, unless they are strict.
    answer: grammar of its text if it calls nothing; None = any text.
    """

    functions: Sequence[Function]
    choice: Choice
    is_parallel: bool = True
    open_names: Collection[str] = ()
    answer: Grammar | None = None
