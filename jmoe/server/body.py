"""From bytes on the wire to a checked request body, every failure a 4xx that names its cause."""

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from jmoe.server.chat_template import RESERVED
from jmoe.server.errors import ApiError, invalid, unsupported
from jmoe.server.schema import NEUTRAL, ChatRequest, CompletionRequest, GenerationRequest, Message
from jmoe.server.settings import ServerSettings
from jmoe.server.tools import check_tools

Body = TypeVar("Body", bound=msgspec.Struct)
_PLACE = re.compile(r"(?P<what>.*) - at `\$\.?(?P<path>.*)`", re.DOTALL)
_FIELD = re.compile(r"Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)


async def read_body(request: Request, settings: ServerSettings) -> bytes:
    """The whole body of a JSON request; 415 for another type, 413 past the limit, 408 where it stalls."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"Content-Type must be application/json, got {kind[:100]!r}"
        raise ApiError(415, message, code="unsupported_media_type")
    limit = settings.max_body_bytes
    too_long = ApiError(413, f"the request body exceeds the limit of {limit} bytes", code="body_too_large")
    stalled = ApiError(408, "the request body did not arrive in time", headers={"Connection": "close"})
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_long
    parts, size, more = [], 0, True
    while more:
        try:
            async with asyncio.timeout(settings.body_timeout):
                message = await request.receive()
        except TimeoutError:
            raise stalled from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        size += len(part)  # counted here too: a chunked body declares no length
        if size > limit:
            raise too_long
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def decode(raw: bytes, kind: type[Body]) -> Body:
    """The body as ``kind``. 400 with code invalid_json where it is no JSON object, else names the field."""
    try:
        body = msgspec.json.decode(raw, type=kind)
        _keep_sent(body, raw)
        return body
    except msgspec.ValidationError as error:
        raise _bad_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else "not valid UTF-8"
        if isinstance(error, msgspec.DecodeError):
            cause = _lone_surrogate(raw) or str(error)
        raise invalid(f"the request body cannot be read as JSON: {cause}", code="invalid_json") from None


class _Conversation(msgspec.Struct):
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


def _keep_sent(body: msgspec.Struct, raw: bytes) -> None:
    """Gives each message and tool of ``body`` the object that it was read from."""
    kept = [name for name in _Conversation.__struct_fields__ if getattr(body, name, None)]
    if kept:
        sent = msgspec.json.decode(raw, type=_Conversation)
        for name in kept:
            for each, given in zip(getattr(body, name), getattr(sent, name), strict=True):
                each.__dict__["sent"] = given


def _lone_surrogate(raw: bytes) -> str | None:
    """The decoder reports half a surrogate pair at the end of a string as truncated input."""
    found = re.search(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}", raw)
    pair = rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    alone = found is not None and re.search(rb"\\u[dD][89a-fA-F]", re.sub(pair, b"", raw)) is not None
    return "a \\u escape is half of a surrogate pair" if alone else None


def _bad_field(text: str) -> ApiError:
    place = _PLACE.fullmatch(text)
    what, path = (place["what"], place["path"]) if place else (text, "")
    field = _FIELD.fullmatch(what)
    if field is not None:
        path = f"{path}.{field[1]}" if path else field[1]
        path = path[:200]
        if "unknown" in what[:25]:
            return invalid(f"Unrecognized request argument: {path}", path, "unknown_parameter")
        return invalid(f"{path} is required", path, "missing_required_parameter")
    if not path:
        return invalid(f"the request body must be a JSON object: {what}", code="invalid_json")
    return invalid(f"{path[:200]}: {what[:300]}", path[:200])


def check_supported(body: msgspec.Struct, prefix: str = "") -> None:
    """Refuses a field whose value asks for what the server cannot do."""
    for name in body.__struct_fields__:
        value: Any = getattr(body, name)
        if name in NEUTRAL and value is not None and not any(_same(value, v) for v in NEUTRAL[name]):
            only = " or ".join(["null", *(msgspec.json.encode(v).decode() for v in NEUTRAL[name])])
            raise unsupported(prefix + name, f"{prefix}{name} is not supported here, only {only} is accepted")


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def check_generation(body: GenerationRequest) -> None:
    """Refuses unsupported fields and combinations that contradict themselves."""
    check_supported(body)
    if body.stream_options is not None:
        check_supported(body.stream_options, "stream_options.")
        if not body.stream:
            raise invalid("stream_options is only allowed with stream: true", "stream_options")


def check_completion(body: CompletionRequest) -> None:
    check_generation(body)
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens must be at least 1 (0 only with echo, to score a prompt)", "max_tokens")


def check_chat(body: ChatRequest) -> None:
    check_generation(body)
    check_messages(body.messages)
    check_tools(body)
    for name in body.chat_template_kwargs or ():
        if name in RESERVED:
            raise invalid(f"{name!r} is not a variable that a request may set", "chat_template_kwargs")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs is only allowed with logprobs: true", "top_logprobs")
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise invalid("max_tokens and max_completion_tokens differ; give one", "max_completion_tokens")


def check_messages(messages: list[Message]) -> None:
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        check_supported(message, f"{where}.")
        if message.tool_calls and message.role != "assistant":
            raise invalid(f"{where}.tool_calls is only for the assistant", f"{where}.tool_calls")
        if (message.tool_call_id is None) == (message.role == "tool"):
            raise invalid(
                f"{where}.tool_call_id belongs to each tool message and to no other", f"{where}.tool_call_id"
            )
