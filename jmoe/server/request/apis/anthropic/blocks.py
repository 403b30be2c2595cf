"""The messages of the Messages API, with their blocks, as messages of a chat."""

from collections.abc import Iterator
from typing import Any

from jmoe.server.errors import invalid, unsupported
from jmoe.server.request.apis.anthropic.fields import Blocks, InputMessage
from jmoe.server.request.apis.conversion import Open, function_call
from jmoe.server.request.decoding import converted

BILLING = "x-anthropic-billing-header:"  # a header for Anthropic's servers, other in every request


class TextBlock(Open, kw_only=True):
    text: str


class ThinkingBlock(Open, kw_only=True):
    thinking: str


class ToolUseBlock(Open, kw_only=True):
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Open, kw_only=True):
    tool_use_id: str
    content: str | Blocks | None = None


def system_messages(system: str | Blocks | None) -> list[dict[str, Any]]:
    """Returns the system message of a request, if it has one."""
    if isinstance(system, list):
        system = [block for block in system if not str(block.get("text", "")).startswith(BILLING)]
    return [{"role": "system", "content": text_content(system, "system")}] if system else []


def chat_messages(message: InputMessage, where: str) -> Iterator[dict[str, Any]]:
    """Yields the messages of a chat that one message means: each result of a tool is one of its own.

    where: path of the message in errors.
    """
    if message.role == "assistant":
        yield _assistant(message.content, f"{where}.content")
    elif message.role == "system" or isinstance(message.content, str):
        yield {"role": message.role, "content": text_content(message.content, f"{where}.content")}
    else:
        yield from _user(message.content, f"{where}.content")


def text_content(content: str | Blocks, where: str) -> str | Blocks:
    """Returns content of text as a chat has it: a text, or several parts."""
    if isinstance(content, str):
        return content
    texts = [_text(block, f"{where}[{i}]") for i, block in enumerate(content)]
    return _joined(texts)


def _joined(texts: list[str]) -> str | Blocks:
    if len(texts) < 2:
        return "".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _user(blocks: Blocks, where: str) -> Iterator[dict[str, Any]]:
    texts: list[str] = []
    for i, block in enumerate(blocks):
        if block.get("type") != "tool_result":
            texts.append(_text(block, f"{where}[{i}]"))
            continue
        if texts:
            yield {"role": "user", "content": _joined(texts)}
            texts = []
        result = converted(block, ToolResultBlock, f"{where}[{i}]")
        content = text_content(result.content or "", f"{where}[{i}].content")
        yield {"role": "tool", "tool_call_id": result.tool_use_id, "content": content}
    if texts or not blocks:
        yield {"role": "user", "content": _joined(texts)}


def _assistant(content: str | Blocks, where: str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for i, block in enumerate(content):
        at = f"{where}[{i}]"
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(converted(block, ThinkingBlock, at).thinking)
        elif kind == "tool_use":
            call = converted(block, ToolUseBlock, at)
            calls.append(function_call(call.id, call.name, call.input))
        elif kind != "redacted_thinking":  # only Anthropic's servers can read these
            texts.append(_text(block, at))
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if any(thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _text(block: dict[str, Any], where: str) -> str:
    kind = block.get("type")
    if kind is None:
        raise invalid(f"{where}.type is required", f"{where}.type", "missing_required_parameter")
    if kind != "text":
        raise unsupported(where, f"{where} has type {str(kind)[:50]!r}, which is not supported here")
    return converted(block, TextBlock, where).text
