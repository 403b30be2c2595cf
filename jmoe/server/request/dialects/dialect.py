"""The declaration of a dialect: the choices that it serves, the grammars of its calls, and its reader."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from jmoe.engine.grammar.grammar import Grammar
from jmoe.server.request.schema import Function

# What a request demands of the answer: calls may come in free text ("auto"), or the answer is a call of a
# function that the model chooses ("required") or that the request names ("named").
Choice = Literal["auto", "required", "named"]


@dataclass(frozen=True)
class PlainText:
    """More of the answer's text, outside of its calls."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call of the function ``name`` begins; its arguments follow."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the arguments' JSON text, of the call that began last."""

    text: str


@dataclass(frozen=True)
class CallEnd:
    """The arguments of the call that began last are whole."""


Event = PlainText | CallStart | Arguments | CallEnd


class Reader(Protocol):
    """Reads one answer. However its text is cut into pieces, the joined events are the same.

    feed: takes the answer's next text and returns what it brings.
    close: returns what was held back until the answer's end.
    """

    def feed(self, text: str) -> list[Event]: ...
    def close(self) -> list[Event]: ...


@dataclass(frozen=True)
class Dialect:
    """One way in which models write calls of functions.

    grammars: for each choice that the dialect serves, the function that makes the grammar of a whole answer
        from the functions that may be called; None if the answer is free text. It raises ValueError for
        parameters that no grammar can follow.
    reader: function that makes the reader of one answer from the choice and the same functions.
    """

    name: str
    grammars: Mapping[Choice, Callable[[Sequence[Function]], Grammar] | None]
    reader: Callable[[Choice, Sequence[Function]], Reader]
