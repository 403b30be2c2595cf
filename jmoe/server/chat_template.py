"""The model's own chat template, rendered in a sandbox.

A template is code from the model's directory and messages are data from strangers: the environment is
immutable and sandboxed, the text's length and the time are bounded, and no request may bring a template.
"""

import datetime
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

log = logging.getLogger(__name__)
MAX_RENDERED = 8 * 1024 * 1024  # characters; the body's limit, for templates that repeat what they are given
MAX_TURN_ENDS = 48  # beside a request's own 16 stop strings
MAX_SECONDS = 5.0  # of the thread's own CPU time; a long conversation takes milliseconds
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
RESERVED = frozenset({
    *TOKENS, "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize",
})  # fmt: skip


class TooLong(jinja2.TemplateRuntimeError):
    """The time for one rendering is over."""


class TimedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates end: every turn of a loop and every call looks at the clock.

    Those are all the ways in which a template can go on: what runs between two of them (an operator, a
    filter) is one pass over values that exist. Renderings on several threads have a clock each.
    """

    def __init__(self, seconds: float):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.filters["in_time"] = self.in_time
        self.seconds, self._local = seconds, threading.local()

    def start_clock(self) -> None:
        self._local.end = time.thread_time() + self.seconds

    def check_clock(self) -> None:
        """Raises TooLong once the time since ``start_clock`` on this thread exceeds the limit."""
        if time.thread_time() > self._local.end:
            raise TooLong(f"it takes longer than {self.seconds:g} s")

    def in_time(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.check_clock()
            yield value

    def call(self, /, *args: Any, **kwargs: Any) -> Any:
        self.check_clock()
        return super().call(*args, **kwargs)

    def template(self, source: str) -> jinja2.Template:
        """The template of ``source`` with ``in_time`` around what every loop goes through."""
        tree = self.parse(source)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, "in_time", [], [], None, None, lineno=loop.lineno)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))


class ChatTemplate:
    """source: Jinja text. tokens: the special tokens by name. Raises ValueError where it does not compile.

    seconds: the time that one rendering may take.
    """

    def __init__(self, source: str, tokens: dict[str, str], seconds: float = MAX_SECONDS):
        self.environment = environment = TimedEnvironment(seconds)
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.tokens = tokens
        try:
            self.template = environment.template(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not compile: {error}") from None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The conversation as text, open for the assistant's answer. ValueError says why it cannot be.

        variables: more that the template may read, without ``RESERVED`` names.
        """
        given = {**variables, **self.tokens, "messages": messages, "add_generation_prompt": True}
        given |= {} if tools is None else {"tools": tools}
        parts, size = [], 0
        self.environment.start_clock()
        try:
            for part in self.template.generate(given):
                size += len(part)
                if size > MAX_RENDERED:
                    break
                parts.append(part)
        except TooLong as error:
            log.warning("the chat template was ended: %s", error)
            raise ValueError(f"the chat template cannot render these messages: {error}") from None
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {_first_line(error)}") from None
        except Exception as error:  # whatever the template's own expressions raise
            log.warning("the chat template failed: %s", _first_line(error))
            raise ValueError("the chat template cannot render these messages") from None
        if size > MAX_RENDERED:
            raise ValueError(f"the rendered conversation exceeds {MAX_RENDERED} characters")
        return "".join(parts)


def load_chat_template(directory: Path) -> ChatTemplate | None:
    """The template of a Hugging Face model directory, None where it has none; ValueError for a bad file.

    ``chat_template.jinja`` goes before ``tokenizer_config.json``, as in transformers.
    """
    config_path, jinja_path = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    config: dict[str, Any] = {}
    try:
        if config_path.is_file():
            config = _json_object(config_path)
        source = _named(config.get("chat_template"))
        if jinja_path.is_file():
            source = jinja_path.read_text(encoding="utf-8")
        return None if source is None else ChatTemplate(source, _special_tokens(config))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the chat template in {directory}: {error}") from None


def load_turn_ends(directory: Path) -> tuple[str, ...]:
    """Strings that end an assistant's turn: ``stop_strings`` of ``generation_config.json``."""
    path = directory / "generation_config.json"
    try:
        config = _json_object(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    ends = config.get("stop_strings") or []
    ends = [ends] if isinstance(ends, str) else ends
    if not isinstance(ends, list) or not all(isinstance(end, str) and end for end in ends):
        raise ValueError(f"{path}: stop_strings must be a list of texts, got {str(ends)[:100]}")
    if len(ends) > MAX_TURN_ENDS:
        raise ValueError(f"{path}: stop_strings holds {len(ends)} texts; the limit is {MAX_TURN_ENDS}")
    return tuple(ends)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, it is {type(value).__name__}")
    return value


def _named(template: Any) -> str | None:
    """A template may be one text or a list of named ones, of which "default" is for plain chat."""
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise ValueError(f"chat_template must be text, it is {type(template).__name__}")
    return template


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    given = {name: config.get(name) for name in TOKENS}
    texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in given.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: Jinja's own filter escapes HTML characters, which would reach the model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
