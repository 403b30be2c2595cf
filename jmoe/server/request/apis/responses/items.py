"""The items of a response's input as messages of a chat.

Consecutive items of one turn of the model (thoughts, text, calls) are one message of the assistant.
"""

from collections.abc import Callable
from typing import Any, Literal

from jmoe.server.errors import ApiError, invalid, unsupported
from jmoe.server.request.apis.conversion import Open, function_call
from jmoe.server.request.apis.responses.tools import ToolName, custom_arguments
from jmoe.server.request.decoding import converted

Content = str | list[dict[str, Any]]
TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
Find = Callable[[str], dict[str, Any] | None]


class MessageItem(Open, kw_only=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class ReasoningItem(Open, kw_only=True):
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None


class FunctionCallItem(Open, kw_only=True):
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class CustomCallItem(Open, kw_only=True):
    call_id: str
    name: str
    input: str
    namespace: str | None = None


class OutputItem(Open, kw_only=True):
    call_id: str
    output: Content


class Reference(Open, kw_only=True):
    id: str


def items_of(given: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Returns the items of an input; a text is a message of the user."""
    if given is None:
        return []
    return [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given


def found_items(items: list[dict[str, Any]], find: Find) -> list[dict[str, Any]]:
    """Returns the items, with stored items in the places of references to them.

    find: function that returns a stored item by its id. An unknown one is a 404, except thoughts, without
        which a conversation can go on: such a reference stays, and adds nothing to a conversation.
    """
    found = []
    for i, item in enumerate(items):
        if item.get("type") != "item_reference":
            found.append(item)
            continue
        where = f"input[{i}]"
        id = converted(item, Reference, where).id
        stored = find(id)
        if stored is not None:
            found.append(stored)
        elif id.startswith("rs_"):
            found.append(item)
        else:
            message = f"{where}: there is no item {id[:80]!r} here; send the item itself"
            raise ApiError(404, message, param=f"{where}.id", code="item_not_found")
    return found


class Conversation:
    """Messages of a chat, made from items in their order."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.turn: dict[str, Any] | None = None  # the assistant's message that grows

    def add(self, item: dict[str, Any], where: str) -> None:
        """Adds an item.

        where: path of the item in errors.
        """
        kind = item.get("type") or "message"
        if kind == "message":
            self._add_message(converted(item, MessageItem, where), f"{where}.content")
        elif kind == "reasoning":
            thoughts = converted(item, ReasoningItem, where)
            texts = texts_of(thoughts.content or thoughts.summary or [], f"{where}.content")
            self._grow("reasoning_content", "\n".join(texts))
        elif kind == "function_call":
            call = converted(item, FunctionCallItem, where)
            self._add_call(call, call.arguments)
        elif kind == "custom_tool_call":
            custom = converted(item, CustomCallItem, where)
            self._add_call(custom, custom_arguments(custom.input))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            result = converted(item, OutputItem, where)
            content = content_of(result.output, f"{where}.output")
            self._end({"role": "tool", "tool_call_id": result.call_id, "content": content})
        elif kind != "item_reference":
            raise unsupported(f"{where}.type", f"{where}.type {str(kind)[:64]!r} is not supported here")

    def _add_message(self, message: MessageItem, where: str) -> None:
        content = content_of(message.content, where)
        if message.role != "assistant":
            return self._end({"role": message.role, "content": content})
        self._grow(
            "content", content if isinstance(content, str) else "".join(part["text"] for part in content)
        )

    def _add_call(self, item: FunctionCallItem | CustomCallItem, arguments: str) -> None:
        name = ToolName(item.name, item.namespace).function
        self._turn().setdefault("tool_calls", []).append(function_call(item.call_id, name, arguments))

    def _grow(self, field: str, text: str) -> None:
        turn = self._turn()
        if text:
            turn[field] = f"{turn[field]}\n{text}" if turn.get(field) else text

    def _turn(self) -> dict[str, Any]:
        if self.turn is None:
            self.turn = {"role": "assistant", "content": ""}
            self.messages.append(self.turn)
        return self.turn

    def _end(self, message: dict[str, Any]) -> None:
        self.turn = None
        self.messages.append(message)


def content_of(content: Content, where: str) -> Content:
    """Returns content as a chat has it: a text, or several parts of text."""
    if isinstance(content, str):
        return content
    texts = texts_of(content, where)
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def texts_of(parts: list[dict[str, Any]], where: str) -> list[str]:
    return [_text(part, f"{where}[{i}]") for i, part in enumerate(parts)]


def _text(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    key = "refusal" if kind == "refusal" else "text"
    if kind not in (*TEXT_PARTS, "refusal"):
        raise unsupported(where, f"{where} has type {str(kind)[:50]!r}; only text is supported")
    if not isinstance(part.get(key), str):
        raise invalid(f"{where}.{key} must be a string", f"{where}.{key}")
    return part[key]
