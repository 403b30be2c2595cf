"""Finds the forms of messages that a chat template takes.

Templates differ in their handling of a call's arguments (text or an object), of content that is a list of
parts and of content that is null. A template that takes the form that a request sent gets it unchanged; a
template that does not take it fails, drops the words, or writes the Python representation of the value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]
KEY, WORD, OTHER = "jmoe_key", "jmoe_word", "jmoe_other"
TEXT = f'{{"{KEY}":"{WORD}"}}'  # without a space: shows whether a template parses it and writes it again
ID = "jmoe00001"  # nine letters and digits, which some templates demand
TOOL = {
    "type": "function",
    "function": {
        "name": "jmoe_tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "A word."}}},
    },
}


@dataclass(frozen=True)
class Forms:
    """The forms of messages that a template takes.

    arguments_text: whether a call's arguments may be JSON text, which it writes unchanged.
    arguments_object: whether a call's arguments may be an object.
    lists: roles whose content may be a list of parts.
    null: whether the message of a call may have null content.
    """

    arguments_text: bool
    arguments_object: bool
    lists: frozenset[str]
    null: bool


def find_forms(render: Render) -> Forms:
    """Finds the forms by rendering sample messages.

    render: function that raises any Exception if the template fails.
    """
    text = _try(render, _with_call(TEXT))
    made = _try(render, _with_call({KEY: WORD}))
    arguments_text = text is not None and TEXT in text
    arguments_object = made is not None and f"'{KEY}'" not in made
    arguments = TEXT if arguments_text else {KEY: WORD}
    null, empty = (_try(render, _with_call(arguments, content)) for content in (None, ""))
    lists = frozenset(role for role in ("system", "user", "assistant", "tool") if _takes_list(render, role))
    null_taken = null is not None and null.count("None") == (empty or "").count("None")
    return Forms(arguments_text, arguments_object, lists, null_taken)


def _try(render: Render, messages: list[dict[str, Any]], tools: bool = True) -> str | None:
    try:
        return render(messages, [TOOL] if tools else None)
    except Exception:
        return None


def _with_call(arguments: Any, content: Any = "") -> list[dict[str, Any]]:
    call = {"id": ID, "type": "function", "function": {"name": "jmoe_tool", "arguments": arguments}}
    return [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": ID, "name": "jmoe_tool", "content": "a result"},
    ]


def _takes_list(render: Render, role: str) -> bool:
    """Returns whether both words of a list of two text parts are written, but not Python's text of the
    list."""
    parts = [{"type": "text", "text": WORD}, {"type": "text", "text": OTHER}]
    messages = {
        "system": [{"role": "system", "content": parts}, {"role": "user", "content": "a question"}],
        "user": [{"role": "user", "content": parts}],
        "assistant": [
            {"role": "user", "content": "a question"},
            {"role": "assistant", "content": parts},
            {"role": "user", "content": "a question"},
        ],
        "tool": [*_with_call({KEY: ""})[:2], _with_call("")[2] | {"content": parts}],
    }[role]
    text = _try(render, messages, tools=role == "tool")
    spelled = (f"'{WORD}'", f'"{WORD}"')
    return text is not None and WORD in text and OTHER in text and not any(s in text for s in spelled)
