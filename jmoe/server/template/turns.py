"""Finds the orders of messages that a chat template takes, and the ids of calls that it needs.

A template refuses an order, or silently leaves out a message; both look alike here: the words of a message
are not in the prompt.
"""

from dataclasses import dataclass
from typing import Any

from jmoe.server.dialects.format import Ids
from jmoe.server.template.probe import (
    ANSWER,
    ID,
    KEY,
    OTHER,
    QUESTION,
    TOOL,
    WORD,
    Messages,
    Probe,
    call,
    result,
    turn,
)

CALLED = "jmoe_called"  # a function that no definition names
LONG_ID = "call_" + "0123456789abcdef" * 2


@dataclass(frozen=True)
class Turns:
    """The orders of messages that a template takes.

    first_system: whether the conversation may begin with a system message.
    systems: whether it may begin with two.
    later_system: whether a system message may stand after others.
    users: whether two messages of the user may follow each other.
    calls: whether one turn may have several calls.
    thoughts_beside_text: whether a turn with a call may have text beside its thoughts.
    ids: form of the ids of calls.
    """

    first_system: bool
    systems: bool
    later_system: bool
    users: bool
    calls: bool
    thoughts_beside_text: bool
    ids: Ids


def find_turns(probe: Probe, *, is_text: bool) -> Turns:
    """Finds the orders by rendering sample messages.

    is_text: whether the arguments of a call are sent as text.
    """
    first, second = ({"role": "system", "content": word} for word in (WORD, OTHER))
    both = [call({KEY: word}, id=f"jmoe0000{i}", as_text=is_text) for i, word in enumerate((WORD, OTHER))]
    said = turn(both[0], content=OTHER, reasoning_content="jmoe_thought", thinking="jmoe_thought")
    return Turns(
        first_system=_has(probe, [first, QUESTION], WORD),
        systems=_has(probe, [first, second, QUESTION], WORD, OTHER),
        later_system=_has(probe, [first, QUESTION, ANSWER, second, QUESTION], WORD, OTHER),
        users=_has(probe, [{"role": "user", "content": word} for word in (WORD, OTHER)], WORD, OTHER),
        calls=_has(probe, [QUESTION, turn(*both), *map(result, both)], WORD, OTHER),
        thoughts_beside_text=not (_fails(probe, said) and not _fails(probe, said | {"content": ""})),
        ids=_ids(probe, is_text),
    )


def _has(probe: Probe, messages: Messages, *words: str) -> bool:
    """Returns whether the prompt has all ``words``."""
    has_calls = any("tool_calls" in message for message in messages)
    text = probe(messages, tools=[TOOL] if has_calls else None)
    return text is not None and all(word in text for word in words)


def _fails(probe: Probe, said: dict[str, Any]) -> bool:
    """Returns whether the template refuses a turn with one call or more."""
    return probe([QUESTION, said, *map(result, said["tool_calls"])], tools=[TOOL]) is None


def _ids(probe: Probe, is_text: bool) -> Ids:
    def shown(id: str) -> str:
        called = call({KEY: WORD}, CALLED, id, as_text=is_text)
        answer = {"role": "tool", "tool_call_id": id, "content": OTHER}
        return probe([QUESTION, turn(called), answer], tools=[TOOL]) or ""

    plain = shown(ID)
    if CALLED not in plain and CALLED in shown(f"functions.{CALLED}:0"):
        return "functions"
    is_cut = ID in plain and LONG_ID not in shown(LONG_ID)
    return "nine" if is_cut or (CALLED in plain and CALLED not in shown(LONG_ID)) else "any"
