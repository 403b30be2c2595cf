"""Messages that spell control tokens: their letters reach the model as text, never as the token.

Every spelling in the messages becomes one private character before the template sees it, so all else that is
spelled in the rendered prompt is the template's own. The prompt is then encoded by a copy of the tokenizer
in which control tokens have private names. A conversation that spells none takes the usual way.
"""

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.renamed import renamed_codec
from jmoe.server.request.conversation.turns import changed_texts
from jmoe.server.template.probe import Messages

PLACES, NAMES = 0xF0000, 0x100000  # first private character in messages, and in the copy of the tokenizer
PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
# A private character as it is, as an escape of JSON and as one of Python.
PLACE = re.compile(r"[\U000f0000-\U000fffff]|\\udb[89ab][0-9a-f]\\ud[c-f][0-9a-f]{2}|\\U000f[0-9a-f]{4}")
MAX_CONTROLS = 0xFF00  # fewer than each of the two planes has


@dataclass(frozen=True)
class Controls:
    """The control tokens of a model whose template is known.

    pattern: finds their spellings, the longest of those at one place; None if there are none.
    places: character in messages by spelling.
    names: character in the copy of the tokenizer by spelling.
    """

    pattern: re.Pattern[str] | None
    places: Mapping[str, str]
    names: Mapping[str, str]

    @classmethod
    def of(cls, spellings: Iterable[str]) -> "Controls":
        ordered = sorted(spellings, key=lambda text: (-len(text), text))[:MAX_CONTROLS]
        pattern = re.compile(any_of(ordered)) if ordered else None
        places = {text: chr(PLACES + i) for i, text in enumerate(ordered)}
        return cls(pattern, places, {text: chr(NAMES + i) for i, text in enumerate(ordered)})


def any_of(spellings: Sequence[str]) -> str:
    """Returns an expression that matches the longest of the texts. Common beginnings are tried once: a model
    may have thousands of control tokens, which all begin alike."""
    parts = []
    for first in sorted({text[0] for text in spellings}):
        group = [text for text in spellings if text[0] == first]
        low, high = min(group), max(group)  # what these have in common, all have
        begin = low[: next((i for i, c in enumerate(low) if high[i] != c), len(low))]
        rests = [text[len(begin) :] for text in group if text != begin]
        rest = f"(?:{any_of(rests)})" if rests else ""
        parts.append(re.escape(begin) + rest + ("?" if rests and begin in group else ""))
    return "|".join(parts)


def control_spellings(codec: TextCodec, source: str) -> set[str]:
    """Returns the texts of the control tokens: all special ones, and the other added tokens in brackets that
    the template's ``source`` names (a tool's tags are often no special tokens)."""
    added = codec.tokenizer.get_added_tokens_decoder().values()
    return {
        token.content
        for token in added
        if not token.single_word
        and (token.special or (token.content[:1] in "<[" and token.content in source))
        and token.content.strip()
    }


@dataclass(frozen=True)
class Given:
    """The values that a template is given.

    messages: messages in the template's forms.
    tools: definitions of tools; None = none.
    variables: other variables of the template.
    """

    messages: Messages
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]


class Literals:
    """Encodes prompts whose messages spell control tokens. The copy of the tokenizer is made at the first.

    source: the template's text.
    thoughts: texts around thoughts: templates look for them in what the assistant said.
    """

    def __init__(self, codec: TextCodec, source: str, thoughts: tuple[str, str]):
        self.codec, self.thoughts = codec, thoughts
        self.controls = Controls.of(control_spellings(codec, source))
        self._copy: TextCodec | None = None
        self._lock = threading.Lock()

    def protected(self, given: Given) -> Given | None:
        """Returns what the template is given with private characters for spellings of control tokens; None
        if there are none. Raises ValueError if there are private characters of its own too."""
        pattern, places = self.controls.pattern, self.controls.places
        if pattern is None or not any(map(pattern.search, texts(given))):
            return None
        if any(map(PRIVATE.search, texts(given))):
            raise ValueError("text that spells a special token must have no characters of planes 15 and 16")

        def changed(value: Any) -> Any:
            return changed_texts(value, lambda text: pattern.sub(lambda match: places[match[0]], text))

        back = str.maketrans({places[text]: text for text in self.thoughts if text in places})

        def message(value: dict[str, Any]) -> dict[str, Any]:
            made = changed(value)
            if value["role"] == "assistant" and "content" in made:
                made["content"] = changed_texts(made["content"], lambda text: text.translate(back))
            return made

        try:
            made = Given([message(m) for m in given.messages], changed(given.tools), changed(given.variables))
        except RecursionError:
            raise ValueError("the messages are nested too deeply") from None
        return None if made == given else made

    def restored(self, text: str) -> str:
        """Returns a rendered prompt with the spellings in the place of their private characters, which a
        template may have written as escapes of JSON or of Python."""
        known: dict[str, str] = {}
        for spelling, place in self.controls.places.items():
            known[place] = spelling
            known[json.dumps(place)[1:-1]] = json.dumps(spelling)[1:-1]
            known[f"\\U{ord(place):08x}"] = repr(spelling)[1:-1]
        return PLACE.sub(lambda match: known.get(match[0], match[0]), text)

    def encode(self, text: str, *, adds_special: bool, limit: int | None) -> list[int]:
        """Returns the token ids of a rendered prompt that has private characters. Raises ValueError if it is
        longer than ``limit`` tokens, or if this tokenizer cannot take a control token's letters as text."""
        pattern = self.controls.pattern
        assert pattern is not None
        named = pattern.sub(lambda match: self.controls.names[match[0]], text)
        limited = {} if limit is None else {"limit": limit}
        return self._copied().encode(self.restored(named), special=adds_special, **limited)

    def _copied(self) -> TextCodec:
        with self._lock:
            if self._copy is None:
                self._copy = renamed_codec(self.codec, self.controls.names)
            return self._copy


def texts(given: Given) -> Iterator[str]:
    """Returns all texts that a template is given, also keys."""
    todo: list[Any] = [given.messages, given.tools, dict(given.variables)]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            todo += value
