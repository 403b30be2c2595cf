"""Which forms of messages a chat template takes.

Templates differ in what they do with a call's arguments (text or an object), with content that is a list of
parts and with content that is null. A template that takes what a request sent gets that unchanged; one that
does not shows it by failing, by dropping the words, or by writing Python's spelling of the value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]
KEY, WORD, OTHER = "jmoe_key", "jmoe_word", "jmoe_other"
TEXT = f'{{"{KEY}":"{WORD}"}}'  # without a space: whoever parses and writes it anew shows
ID = "jmoe00001"  # letters and digits, nine of them: what some templates demand
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
    """What a template takes.

    arguments_text: a call's arguments as JSON text, which it writes as it is.
    arguments_object: them as an object.
    lists: the roles whose content may be a list of parts.
    null: a call whose message has null content.
    """

    arguments_text: bool
    arguments_object: bool
    lists: frozenset[str]
    null: bool


def find_forms(render: Render) -> Forms:
    """render: raises any Exception where the template fails."""
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
    """Whether both words of a list of two text parts are written, and nothing of the list itself."""
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
