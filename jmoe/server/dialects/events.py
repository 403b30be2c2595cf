"""The events of an answer that may call functions, and what a reader of such answers is.

Readers (``reader``, ``json_call``) find events in the text of an answer; the formats of answers
(``jmoe.server.answer``) write them, and know no dialect.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

# What a request demands of the answer: calls may come in free text ("auto"), or the answer is at least one
# call, of functions that the model chooses ("required") or of the one that the request names ("named").
Choice = Literal["auto", "required", "named"]


class Function(Protocol):
    """A function that an answer may call.

    parameters: JSON schema of an object; None if the function has no arguments.
    strict: whether the schema must be followed exactly.
    """

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> dict[str, Any] | None: ...
    @property
    def strict(self) -> bool | None: ...


@dataclass(frozen=True)
class PlainText:
    """More of the answer's text, outside of its calls."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call of the function ``name`` begins; its arguments follow.

    id: id that the model itself gave to the call; None if its format has none.
    """

    name: str
    id: str | None = None


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
