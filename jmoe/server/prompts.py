"""Prompts as token ids: from text, token ids or chat messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from jmoe.engine.text import TextCodec
from jmoe.server.bounds import check_json
from jmoe.server.chat_template import ChatTemplate
from jmoe.server.errors import ApiError, invalid, unsupported
from jmoe.server.schema import MAX_CHOICES, Message, ToolCall


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids and, where echoed, its text."""

    token_ids: list[int]
    text: str = ""


def completion_prompts(
    given: str | list[str | int | list[int]], codec: TextCodec | None, *, echo: bool, special: bool = True
) -> list[Prompt]:
    """One prompt or several: text, list of texts, token ids, list of token-id lists.

    special: whether text gets the tokenizer's own special tokens.
    """
    if isinstance(given, str):
        return [_from_text(given, codec, special)]
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise invalid("prompt must not mix strings, token ids and lists", "prompt")
    if not kinds:
        raise invalid("prompt must not be empty", "prompt")
    if kinds == {int}:
        return [_from_ids(given, codec, echo)]  # type: ignore[arg-type]
    if len(given) > MAX_CHOICES:
        raise invalid(f"prompt holds {len(given)} prompts; the limit is {MAX_CHOICES}", "prompt")
    if kinds == {str}:
        return [_from_text(item, codec, special) for item in given]  # type: ignore[arg-type]
    return [_from_ids(item, codec, echo) for item in given]  # type: ignore[arg-type]


def encode(text: str, codec: TextCodec | None, param: str, *, special: bool) -> list[int]:
    if codec is None:
        raise invalid("this model has no tokenizer: give the prompt as token ids to /v1/completions", param)
    try:
        return codec.encode(text, special=special)
    except ValueError as error:
        raise invalid(str(error), param) from None


def _from_text(text: str, codec: TextCodec | None, special: bool) -> Prompt:
    ids = encode(text, codec, "prompt", special=special)
    if not text or not ids:  # a BOS alone is no prompt
        raise invalid("prompt must not be empty", "prompt")
    return Prompt(ids, text)


def _from_ids(ids: list[int], codec: TextCodec | None, echo: bool) -> Prompt:
    """Token ids as they are: no BOS is added (evaluation harnesses send their own)."""
    if not ids:
        raise invalid("prompt must not be empty", "prompt")
    small = all(0 <= t < 2**31 for t in ids)  # the engine names the bad id; the tokenizer cannot take it
    text = codec.decode(ids, skip_special=False) if echo and codec is not None and small else ""
    return Prompt(ids, text)


def chat_prompt(
    messages: list[Message],
    template: ChatTemplate | None,
    codec: TextCodec | None,
    tools: list[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] = MappingProxyType({}),
    special: bool = False,
) -> Prompt:
    """The rendered conversation. The template writes the special tokens, so none are added again.

    tools, variables: what the template gets beside the messages. special: add special tokens nevertheless.
    """
    if template is None:
        raise ApiError(
            400,
            "this model directory has no chat template; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    try:
        text = template.render([_plain(i, m) for i, m in enumerate(messages)], tools, variables)
    except ValueError as error:
        raise invalid(str(error), "messages") from None
    return Prompt(encode(text, codec, "messages", special=special), text)


def _plain(i: int, message: Message) -> dict[str, Any]:
    """A message as templates know it. "developer" is OpenAI's newer word for "system"."""
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise invalid(f"messages[{i}].content is required", f"messages[{i}].content")
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part_text(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content))
    plain = {"role": "system" if message.role == "developer" else message.role, "content": content}
    calls = [
        _plain_call(call, f"messages[{i}].tool_calls[{j}]") for j, call in enumerate(message.tool_calls or ())
    ]
    rest = {"name": message.name, "tool_call_id": message.tool_call_id, "tool_calls": calls or None}
    return plain | {key: value for key, value in rest.items() if value is not None}


def _plain_call(call: ToolCall, where: str) -> dict[str, Any]:
    """A call as templates know it: they expect the arguments as an object."""
    try:
        text = call.function.arguments.encode(errors="replace") or b"{}"
        check_json(text, f"{where}.function.arguments", f"{where}.function.arguments")
        arguments = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        field = f"{where}.function.arguments"
        raise invalid(f"{field} must be the JSON text of an object", field) from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _part_text(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind != "text":
        raise unsupported(where, f"{where} has type {str(kind)[:50]!r}; only 'text' is supported")
    if not isinstance(part.get("text"), str):
        raise invalid(f"{where}.text must be a string", f"{where}.text")
    other = next((key for key in part if key not in ("type", "text")), None)
    if other is not None:
        raise invalid(f"Unrecognized request argument: {where}.{other[:100]}", where, "unknown_parameter")
    return part["text"]
