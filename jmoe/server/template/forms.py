"""Finds the forms of messages that a chat template takes.

Templates differ in their handling of a call's arguments (text or an object), of content that is a list of
parts and of content that is null. A template that takes the form that a request sent gets it unchanged; a
template that does not take it fails, drops the words, or writes the Python representation of the value.
"""

from dataclasses import dataclass
from typing import Any

from jmoe.server.template.probe import (
    ANSWER,
    KEY,
    OTHER,
    QUESTION,
    TEXT,
    TOOL,
    WORD,
    Messages,
    Probe,
    call,
    result,
    turn,
)
from jmoe.server.template.turns import Turns, find_turns


@dataclass(frozen=True)
class Forms:
    """The forms of messages that a template takes.

    arguments_text: whether a call's arguments may be JSON text, which it writes unchanged.
    arguments_object: whether a call's arguments may be an object.
    lists: roles whose content may be a list of parts.
    null: whether the message of a call may have null content.
    has_tools: whether it writes the definitions of tools.
    turns: orders of messages that it takes.
    """

    arguments_text: bool
    arguments_object: bool
    lists: frozenset[str]
    null: bool
    has_tools: bool
    turns: Turns


def find_forms(probe: Probe) -> Forms:
    """Finds the forms by rendering sample messages."""
    text = probe(_with_call(TEXT), tools=[TOOL])
    made = probe(_with_call({KEY: WORD}), tools=[TOOL])
    arguments_text = text is not None and TEXT in text
    arguments_object = made is not None and f"'{KEY}'" not in made
    arguments = TEXT if arguments_text else {KEY: WORD}
    null, empty = (probe(_with_call(arguments, content), tools=[TOOL]) for content in (None, ""))
    return Forms(
        arguments_text=arguments_text,
        arguments_object=arguments_object,
        lists=frozenset(r for r in ("system", "user", "assistant", "tool") if _takes_list(probe, r)),
        null=null is not None and null.count("None") == (empty or "").count("None"),
        has_tools=_has_tools(probe),
        turns=find_turns(probe, is_text=arguments_text and not arguments_object),
    )


def _has_tools(probe: Probe) -> bool:
    """Returns whether name and arguments of a tool are in the prompt of a question."""
    shown = probe([QUESTION], tools=[TOOL]) or ""
    return TOOL["function"]["name"] in shown and KEY in shown


def _with_call(arguments: Any, content: Any = "") -> Messages:
    called = call(arguments)
    return [QUESTION, turn(called, content=content), result(called)]


def _takes_list(probe: Probe, role: str) -> bool:
    """Returns whether both words of a list of two text parts are written, but not Python's text of the
    list."""
    parts = [{"type": "text", "text": WORD}, {"type": "text", "text": OTHER}]
    messages = {
        "system": [{"role": "system", "content": parts}, QUESTION],
        "user": [{"role": "user", "content": parts}],
        "assistant": [QUESTION, ANSWER | {"content": parts}, QUESTION],
        "tool": [*_with_call({KEY: ""})[:2], result(call("")) | {"content": parts}],
    }[role]
    text = probe(messages, tools=[TOOL] if role == "tool" else None)
    spelled = (f"'{WORD}'", f'"{WORD}"')
    return text is not None and WORD in text and OTHER in text and not any(s in text for s in spelled)
