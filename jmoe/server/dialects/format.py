"""The record of the form in which a family of models writes calls of functions.

Both the reader (``reader``) and the grammar (``grammar``) of an answer follow it, so they agree.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal, Self

# What the ids of calls look like: any text; exactly nine letters and digits; "functions.NAME:N".
Ids = Literal["any", "nine", "functions"]


@dataclass(frozen=True)
class Tagged:
    """The form of arguments that are written one by one: ``key NAME value VALUE end``.

    A text stands there as it is, any other value as JSON. White space at the outer sides of ``value`` and
    ``end`` belongs to the form exactly as it is written.
    """

    key: str
    value: str
    end: str


@dataclass(frozen=True)
class Format:
    """A call is ``opens NAME named ARGUMENTS closes``; all calls are ``begin call (between call)* end``.

    name: its name for ``--tool-format``.
    opens: text before a function's name.
    named: text between the name and the arguments.
    closes: text after the arguments.
    begin: text before the first call.
    end: text after the last call.
    between: text between two calls. Without ``begin`` and ``is_at_start``, text may also be there.
    arguments: form of the arguments: a JSON object, keyword arguments of Python, or tags around each.
    is_numbered: whether ":N" follows the name, where N counts the calls of the conversation.
    is_at_start: whether calls stand only at the beginning of an answer.
    ids: form of the ids of calls.
    """

    name: str
    opens: str
    named: str
    closes: str
    begin: str = ""
    end: str = ""
    between: str = ""
    arguments: Literal["json", "pythonic"] | Tagged = "json"
    is_numbered: bool = False
    is_at_start: bool = False
    ids: Ids = "any"

    def __post_init__(self) -> None:
        tags = self.arguments
        if not (self.begin + self.opens).strip():
            raise ValueError("begin and opens are empty: nothing would begin a call")
        if not self.opens and not self.is_at_start:
            raise ValueError("opens is empty, which only calls at the start of an answer allow")
        if not self.named.strip() and not isinstance(tags, Tagged):
            raise ValueError("named is empty: nothing would end a function's name")
        if isinstance(tags, Tagged) and not (
            tags.key.strip() and tags.value.strip() and tags.end.strip() and self.closes.strip()
        ):
            raise ValueError("arguments between tags need key, value, end and closes")
        if tags == "pythonic" and not self.closes.startswith(")"):
            raise ValueError("closes must begin with ')', which ends arguments of Python")
        if self.is_list and not self.begin and not self.between.strip():
            raise ValueError("between is empty: nothing would part two calls")

    @property
    def is_list(self) -> bool:
        """Whether calls follow each other directly, without text between them."""
        return bool(self.begin) or self.is_at_start

    @property
    def trigger(self) -> str:
        """The part of the first call's opening that no free text holds: its first tag, or all of it."""
        whole = self.begin + self.opens
        found = re.match(r"<[^<>\s]+>|\[[A-Z_]+\]|[\ue000-\uf8ff]", whole)
        return found[0] if found else whole.rstrip()

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the form, in which markers may be."""
        tags = self.arguments
        tagged = (tags.key, tags.value, tags.end) if isinstance(tags, Tagged) else ()
        return (self.begin, self.opens, self.named, self.closes, self.between, self.end, *tagged)

    def with_texts(self, texts: tuple[str, ...]) -> Self:
        """Returns the format with other texts, in the order of ``texts``."""
        names = ("begin", "opens", "named", "closes", "between", "end")
        tagged = texts[len(names) :]
        arguments = Tagged(*tagged) if tagged else self.arguments
        return replace(self, **dict(zip(names, texts, strict=False)), arguments=arguments)
