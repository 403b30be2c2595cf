"""Renders sample conversations, to find what a chat template does with each form of messages."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

log = logging.getLogger(__name__)
Messages = list[dict[str, Any]]
MAX_SECONDS = 10.0  # processor time of all samples of a template; they take milliseconds

KEY, WORD, OTHER = "jmoe_key", "jmoe_word", "jmoe_other"
TEXT = f'{{"{KEY}":"{WORD}"}}'  # without a space: shows whether a template parses it and writes it again
NAME, ID = "jmoe_tool", "jmoe00001"  # nine letters and digits, which some templates demand
QUESTION = {"role": "user", "content": "jmoe_question"}
ANSWER = {"role": "assistant", "content": "jmoe_answer"}
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "A word."}}},
    },
}


class Render(Protocol):
    """Renders a conversation; it raises any Exception if the template fails.

    tools: definitions of tools; None = none.
    variables: other variables of the template.
    """

    def __call__(
        self, messages: Messages, tools: list[dict[str, Any]] | None, variables: Mapping[str, Any], /
    ) -> str: ...


class Probe:
    """Renders samples. Once all of them together took ``seconds`` of processor time, each further one counts
    as failed."""

    def __init__(
        self, render: Render, seconds: float = MAX_SECONDS, clock: Callable[[], float] = time.thread_time
    ):
        self._render, self._left, self._clock = render, seconds, clock

    def __call__(
        self,
        messages: Messages,
        *,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str | None:
        """Returns the rendered sample; None if the template fails."""
        if self._left <= 0:
            return None
        begun = self._clock()
        try:
            return self._render(messages, tools, variables)
        except Exception:
            return None
        finally:
            self._left -= self._clock() - begun
            if self._left <= 0:
                log.warning("the chat template takes too long to try all forms of messages")


def call(
    arguments: Mapping[str, Any] | str, name: str = NAME, id: str = ID, *, as_text: bool = False
) -> dict[str, Any]:
    """Returns a call of a function.

    as_text: whether arguments that are an object become JSON text.
    """
    given = (
        json.dumps(arguments, ensure_ascii=False) if as_text and not isinstance(arguments, str) else arguments
    )
    return {"id": id, "type": "function", "function": {"name": name, "arguments": given}}


def turn(*calls: dict[str, Any], content: Any = "", **more: Any) -> dict[str, Any]:
    """Returns an assistant's turn with calls."""
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def result(called: dict[str, Any], content: Any = "jmoe_result") -> dict[str, Any]:
    """Returns the result of a call."""
    name = called["function"]["name"]
    return {"role": "tool", "tool_call_id": called["id"], "name": name, "content": content}
