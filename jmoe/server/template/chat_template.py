"""The model's own chat template, rendered in a sandbox.

A template is code from the model's directory and messages are data from strangers: the environment is
immutable and sandboxed, the text's length and the time are bounded, and no request may bring a template.
"""

import datetime
import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2

from jmoe.engine.text.tokenizer_files import MORE, NAMES, json_object, read_config
from jmoe.server.template.bounds import MAX_SIZE, TooLarge, TooLong
from jmoe.server.template.forms import Forms, find_forms
from jmoe.server.template.probe import Probe
from jmoe.server.template.sandbox import BoundedEnvironment
from jmoe.server.template.thinking import Thinking, find_thinking

log = logging.getLogger(__name__)
MAX_RENDERED = MAX_SIZE
MAX_TURN_ENDS = 48  # in addition to a request's own 16 stop strings
MAX_SECONDS = 5.0  # CPU time of the thread; a long conversation takes milliseconds
PROBE_SECONDS = 0.5
MAX_SOURCE = 1 << 20  # bytes of a template's file
DEFAULT, TOOL_USE = "default", "tool_use"
RESERVED = frozenset({
    *NAMES, MORE, "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize",
})  # fmt: skip


class ChatTemplate:
    """A compiled chat template. The constructor raises ValueError if it does not compile.

    source: Jinja text.
    tokens: special tokens by name.
    seconds: CPU time that one rendering may take.
    tool_use: Jinja text for conversations with tools; None = ``source``.
    """

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, Any],
        seconds: float = MAX_SECONDS,
        tool_use: str | None = None,
    ):
        self.environment = environment = BoundedEnvironment()
        environment.filters["tojson"] = environment.bounded("tojson", _tojson)
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.source, self.tokens, self.seconds = source, tokens, seconds
        environment.bounds.start(seconds)
        try:
            self.template = environment.template(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not compile: {_first_line(error)}") from None
        except Exception as error:  # Python's own compiler has limits too
            raise ValueError(f"the chat template does not compile: {type(error).__name__}") from None
        self.tool_use = None if tool_use is None else ChatTemplate(tool_use, tokens, seconds)

    def chosen(self, tools: list[dict[str, Any]] | None) -> "ChatTemplate":
        """Returns the template for a conversation with these tools, or without any."""
        return self if tools is None or self.tool_use is None else self.tool_use

    @cached_property
    def forms(self) -> Forms:
        """The forms of messages that this template takes, found by rendering sample messages."""
        return find_forms(self.probe)

    @cached_property
    def thinking(self) -> Thinking:
        """The thoughts of the model, found by rendering sample messages."""
        return find_thinking(self.probe, self.source)

    @cached_property
    def probe(self) -> Probe:
        """Renders sample messages."""
        return Probe(
            lambda messages, tools, variables: self._render(messages, tools, variables, PROBE_SECONDS)
        )

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
        *,
        opens_answer: bool = True,
    ) -> str:
        """Renders the conversation. A ValueError says why it cannot be rendered.

        variables: other variables for the template, without ``RESERVED`` names.
        opens_answer: whether the beginning of the assistant's answer follows the last message.
        """
        chosen = self.chosen(tools)
        try:
            text = chosen._render(messages, tools, variables, chosen.seconds, opens_answer=opens_answer)
        except TooLong as error:
            log.warning("the chat template was ended: %s", error)
            raise ValueError(f"the chat template cannot render these messages: {error}") from None
        except TooLarge as error:
            log.warning("the chat template was ended: %s", error)
            raise ValueError("the chat template cannot render these messages") from None
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {_first_line(error)}") from None
        except Exception as error:  # whatever the template's own expressions raise
            log.warning("the chat template failed: %s", _first_line(error))
            raise ValueError("the chat template cannot render these messages") from None
        if len(text) > MAX_RENDERED:
            raise ValueError(f"the rendered conversation exceeds {MAX_RENDERED} characters")
        return text

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        seconds: float,
        *,
        opens_answer: bool = True,
    ) -> str:
        context = {**variables, **self.tokens, "messages": messages, "tools": tools, "documents": None}
        self.environment.bounds.start(seconds)
        parts, size = [], 0
        for part in self.template.generate(context | {"add_generation_prompt": opens_answer}):
            size += len(part)
            parts.append(part)
            if size > MAX_RENDERED:
                break
        return "".join(parts)


def load_chat_template(directory: Path, file: str | None = None) -> ChatTemplate | None:
    """Returns the template of a Hugging Face model directory; None if it has none. A bad file raises
    ValueError.

    file: file of the template, instead of those of the directory.

    Separate template files take precedence over ``tokenizer_config.json``, as in transformers;
    ``chat_template.json``, which processors have, is read last.
    """
    try:
        files = read_config(directory)
        if file is not None:
            return ChatTemplate(_source(Path(file)), files.names())
        sources = _from_files(directory) or _named_sources(files.values.get("chat_template"))
        if not sources and (directory / "chat_template.json").is_file():
            sources = _named_sources(json_object(directory / "chat_template.json").get("chat_template"))
        if not sources:
            return None
        default = sources.get(DEFAULT)
        if default is None:  # transformers too renders only conversations with tools for such a model
            default = "{{ raise_exception('this model has no default chat template') }}"
        return ChatTemplate(default, files.names(), tool_use=sources.get(TOOL_USE))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the chat template in {file or directory}: {error}") from None


def load_turn_ends(directory: Path) -> tuple[str, ...]:
    """Returns the strings that end an assistant's turn: ``stop_strings`` of ``generation_config.json``."""
    path = directory / "generation_config.json"
    try:
        config = json_object(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    ends = config.get("stop_strings") or []
    ends = [ends] if isinstance(ends, str) else ends
    if not isinstance(ends, list) or not all(isinstance(end, str) and end for end in ends):
        raise ValueError(f"{path}: stop_strings must be a list of texts, got {str(ends)[:100]}")
    if len(ends) > MAX_TURN_ENDS:
        raise ValueError(f"{path}: stop_strings holds {len(ends)} texts; the limit is {MAX_TURN_ENDS}")
    return tuple(ends)


def _from_files(directory: Path) -> dict[str, str]:
    """Returns templates by name: ``chat_template.jinja`` is the default, the others are named after their
    files."""
    paths = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        paths[DEFAULT] = directory / "chat_template.jinja"
    return {name: _source(path) for name, path in paths.items()}


def _source(path: Path) -> str:
    if path.stat().st_size > MAX_SOURCE:
        raise ValueError(f"{path.name} has more than {MAX_SOURCE} bytes")
    return path.read_text(encoding="utf-8")


def _named_sources(template: Any) -> dict[str, str]:
    """Returns templates by name. A config may hold one text, or named texts as a list or an object."""
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {str(entry.get("name")): entry.get("template") for entry in named}
    sources = template if isinstance(template, dict) else {DEFAULT: template}
    for source in sources.values():
        if not isinstance(source, str | None):
            raise ValueError(f"chat_template must be text, it is {type(source).__name__}")
    return {name: source for name, source in sources.items() if source is not None}


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | str | None = None, **options: Any) -> str:
    """Returns plain JSON: Jinja's own filter escapes HTML characters, which would reach the model."""
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)
    parts, size = [], 0
    for part in json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, **options).iterencode(value):
        size += len(part)  # the indentation grows with the depth
        if size > MAX_SIZE:
            raise TooLarge
        parts.append(part)
    return "".join(parts)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
