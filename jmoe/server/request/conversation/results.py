"""The results of an assistant's calls: each belongs to a call of the turn before it.

Most templates write results one after another and no ids, so the model takes the first result for that of the
first call: results in another order are put into that of the calls. Whatever would leave a result with the
wrong call, or with none, is refused, as OpenAI refuses it.
"""

from collections.abc import Sequence

from jmoe.server.errors import invalid
from jmoe.server.request.fields.chat import Message

BETWEEN = ("system", "developer")  # roles that clients put between a call and its result


def in_order(messages: Sequence[Message]) -> list[int]:
    """Returns the indices of the messages in the order in which the template gets them. A 400 names the
    result, or the call, that has no counterpart."""
    order: list[int] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        if message.role == "tool":
            raise _unknown(at, message)
        order.append(at)
        at += 1
        if not message.tool_calls:
            continue
        end = next(
            (i for i in range(at, len(messages)) if messages[i].role not in ("tool", *BETWEEN)), len(messages)
        )
        order += _turn(messages, at - 1, range(at, end))
        at = end
    return order


def _turn(messages: Sequence[Message], turn: int, following: range) -> list[int]:
    """Returns the messages between a turn with calls and the next turn: the results first.

    turn: index of the message with the calls.
    following: indices of the messages after it.
    """
    ids = [call.id for call in messages[turn].tool_calls or ()]
    twice = next((id for i, id in enumerate(ids) if id in ids[:i]), None)
    if twice is not None:
        raise invalid(
            f"messages[{turn}].tool_calls: two calls have the id {twice[:64]!r}",
            f"messages[{turn}].tool_calls",
        )
    found: dict[str, int] = {}
    for i in following:
        id = messages[i].tool_call_id
        if id is None:
            continue
        if id not in ids:
            raise _unknown(i, messages[i])
        if id in found:
            raise invalid(
                f"messages[{i}]: the call {id[:64]!r} already has the result messages[{found[id]}]",
                f"messages[{i}].tool_call_id",
            )
        found[id] = i
    missing = next((id for id in ids if id not in found), None)
    if found and missing is not None:
        raise invalid(
            f"messages[{turn}].tool_calls: the call {missing[:64]!r} has no result, another of them has one",
            "messages",
        )
    return [*(found[id] for id in ids if id in found), *(i for i in following if messages[i].role in BETWEEN)]


def _unknown(i: int, message: Message) -> Exception:
    id = (message.tool_call_id or "")[:64]
    return invalid(
        f"messages[{i}].tool_call_id {id!r} is the id of no call in the turn before it",
        f"messages[{i}].tool_call_id",
    )
