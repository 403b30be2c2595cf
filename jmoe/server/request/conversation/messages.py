"""Messages as the model's chat template gets them: as they were sent, if the template takes that form."""

import json
from typing import Any

import msgspec

from jmoe.server.errors import invalid, unsupported
from jmoe.server.request.bounds import check_json
from jmoe.server.request.fields.chat import Message
from jmoe.server.template.forms import Forms

# Keys of an assistant's reasoning: the first is read by most templates, the second by some, the third is sent
# by some clients.
THOUGHT = ("reasoning_content", "thinking", "reasoning")
TEXT_KEYS = ("type", "text", "cache_control")


def template_message(i: int, message: Message, forms: Forms) -> dict[str, Any]:
    """Returns message ``i`` for a template that takes ``forms``.

    A key whose value is null counts as absent, except content: an assistant's content is null if it calls a
    tool.
    "developer" is OpenAI's newer word for "system".
    """
    where = f"messages[{i}]"
    plain: dict[str, Any] = {
        key: value for key, value in message.source.items() if value is not None or key == "content"
    }
    plain["role"] = role = "system" if message.role == "developer" else message.role
    if message.content is None and role != "assistant":
        raise invalid(f"{where}.content is required", f"{where}.content")
    thought = next((plain[key] for key in THOUGHT if key in plain), None)
    if thought is not None:  # as in transformers 5: under both names that templates read
        plain = {"thinking": thought, **plain, "reasoning_content": thought}
    if message.content is None and not forms.null:
        plain["content"] = ""
    elif isinstance(message.content, list):
        texts = [_part_text(p, role, f"{where}.content[{j}]") for j, p in enumerate(message.content)]
        parts = [_plain_part(p, t) for p, t in zip(message.content, texts, strict=True)]
        plain["content"] = parts if role in forms.lists else "\n".join(texts)
    if message.tool_calls:
        calls: list[dict[str, Any]] = message.source["tool_calls"]
        plain["tool_calls"] = [_call(c, forms, f"{where}.tool_calls[{j}]") for j, c in enumerate(calls)]
    return plain


def _call(source: dict[str, Any], forms: Forms, where: str) -> dict[str, Any]:
    """Returns a call with its arguments in a form that the template takes: as sent, if it takes both."""
    call = {key: value for key, value in source.items() if value is not None} | {"type": "function"}
    function: dict[str, Any] = source["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        parsed = _parsed(arguments, f"{where}.function.arguments")
        arguments = parsed if forms.arguments_object and not forms.arguments_text else arguments
    elif isinstance(arguments, dict) and not forms.arguments_object and forms.arguments_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


def _parsed(text: str, field: str) -> dict[str, Any]:
    """Parses ``text`` as a JSON object. A call that was cut off is not JSON; its text becomes an argument."""
    raw = text.encode(errors="replace") or b"{}"
    check_json(raw, field, field)
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except msgspec.ValidationError:
        raise invalid(f"{field} must be the JSON text of an object", field) from None
    except (msgspec.DecodeError, RecursionError):
        return {"arguments": text}


def _plain_part(part: dict[str, Any], text: str) -> dict[str, Any]:
    return part if part["type"] == "text" else {"type": "text", "text": text}


def _part_text(part: dict[str, Any], role: str, where: str) -> str:
    """Returns the text of a text part, or of an assistant's refusal."""
    kind = part.get("type")
    if kind != "text" and not (kind == "refusal" and role == "assistant"):
        raise unsupported(where, f"{where} has type {str(kind)[:50]!r}; only 'text' is supported")
    if not isinstance(part.get(kind), str):
        raise invalid(f"{where}.{kind} must be a string", f"{where}.{kind}")
    other = next((key for key in part if key not in (*TEXT_KEYS, kind)), None)
    if other is not None:
        raise invalid(f"Unrecognized request argument: {where}.{other[:100]}", where, "unknown_parameter")
    return part[kind]
