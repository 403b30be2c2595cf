"""Fits a conversation to the orders of messages that a template takes, without losing a word of it."""

import hashlib
import re
import string
from collections.abc import Callable
from typing import Any

from jmoe.server.dialects.format import Ids
from jmoe.server.template.probe import Messages
from jmoe.server.template.turns import Turns

ALPHABET = string.digits + string.ascii_letters
NINE = re.compile(r"[0-9A-Za-z]{9}")
SEPARATOR = "\n\n"
THOUGHTS = ("reasoning_content", "thinking")  # keys under which templates read thoughts


def fitted(messages: Messages, turns: Turns) -> Messages:
    """Returns the messages in an order, and with ids, that the template takes.

    messages: messages in the template's forms; each turn's results follow it, in the order of its calls.
    """
    if turns.ids != "any":
        messages = with_ids(messages, turns.ids)
    if not turns.calls:
        messages = _with_single_calls(messages)
    if not turns.thoughts_beside_text:
        messages = [_with_thoughts_alone(message) for message in messages]
    messages = _with_systems(messages, turns)
    return messages if turns.users else _with_joined_users(messages)


def with_ids(messages: Messages, ids: Ids) -> Messages:
    """Returns the messages with ids of calls in the form that the template needs.

    "functions": the template writes only the id, in which the function's name must be, with the number of the
        call in the conversation.
    "nine": nine letters and digits; other ids become such by their hash.
    """
    number, names, made = 0, dict[str, str](), []
    for message in messages:
        if message.get("tool_calls"):
            calls, names = [], {}
            for call in message["tool_calls"]:
                named = f"functions.{call['function']['name']}:{number}"
                names[call["id"]] = named if ids == "functions" else _nine(call["id"])
                calls.append(call | {"id": names[call["id"]]})
                number += 1
            message = message | {"tool_calls": calls}
        elif message["role"] == "tool":
            message = message | {"tool_call_id": names[message["tool_call_id"]]}
        made.append(message)
    return made


def _nine(id: str) -> str:
    if NINE.fullmatch(id):
        return id
    number, made = int.from_bytes(hashlib.sha256(id.encode(errors="replace")).digest(), "big"), ""
    for _ in range(9):
        number, digit = divmod(number, len(ALPHABET))
        made += ALPHABET[digit]
    return made


def _with_single_calls(messages: Messages) -> Messages:
    """Returns the messages with each turn of several calls as several turns: call, result, call, result."""
    made, at = Messages(), 0
    while at < len(messages):
        message, calls = messages[at], messages[at].get("tool_calls") or []
        at += 1
        if len(calls) < 2:
            made.append(message)
            continue
        results = {}
        while at < len(messages) and messages[at]["role"] == "tool":
            results[messages[at]["tool_call_id"]] = messages[at]
            at += 1
        bare = {key: value for key, value in message.items() if key not in ("reasoning", *THOUGHTS)}
        for i, call in enumerate(calls):
            first = message if i == 0 else bare | {"content": ""}
            made += [first | {"tool_calls": [call]}, *(results[id] for id in [call["id"]] if id in results)]
    return made


def _with_thoughts_alone(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message whose text, if it has thoughts and a call too, is the end of its thoughts."""
    thought = next((message[key] for key in THOUGHTS if message.get(key)), None)
    text = _text(message.get("content"))
    if not message.get("tool_calls") or not thought or not text:
        return message
    both = thought + SEPARATOR + text
    return message | {"content": ""} | {key: both for key in THOUGHTS if key in message}


def _with_systems(messages: Messages, turns: Turns) -> Messages:
    """Returns the messages with system messages where the template takes them; the text of others begins the
    next turn of the user."""
    leading = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    first, rest = messages[:leading], messages[leading:]
    if not turns.first_system:
        first, rest = [], messages
    elif leading > 1 and not turns.systems:
        first = [_joined(first)]
    if turns.first_system and turns.later_system:
        return [*first, *rest]
    made, held = Messages(), Messages()
    for message in rest:
        if message["role"] == "system":
            held.append(message)
            continue
        if held and message["role"] == "user":
            message = message | {"content": _joined([*held, message])["content"]}
        elif held:
            made.append(_joined(held) | {"role": "user"})
        held = []
        made.append(message)
    return [*first, *made, *([_joined(held) | {"role": "user"}] if held else [])]


def _with_joined_users(messages: Messages) -> Messages:
    """Returns the messages with all messages of the user that follow each other as one."""
    made = Messages()
    for message in messages:
        if made and message["role"] == made[-1]["role"] == "user":
            message = _joined([made.pop(), message])
        made.append(message)
    return made


def _joined(messages: Messages) -> dict[str, Any]:
    """Returns the first message with the texts of all. A single one keeps its content."""
    if len(messages) == 1:
        return messages[0]
    texts = [_text(message.get("content")) for message in messages]
    return messages[0] | {"content": SEPARATOR.join(text for text in texts if text)}


def _text(content: Any) -> str:
    return content or "" if not isinstance(content, list) else "\n".join(part["text"] for part in content)


def changed_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Returns JSON ``value`` with ``change`` of every text in it, also of keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): changed_texts(each, change) for key, each in value.items()}
    return [changed_texts(each, change) for each in value] if isinstance(value, list) else value
