"""The common parts of bodies of other APIs, which become chat requests.

Their fields say the same in other words, so the checks, template, tools, grammars and sampling of a chat are
theirs too. Clients add fields to these APIs every month: an unknown one is logged once and has no effect.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from jmoe.server.errors import ApiError
from jmoe.server.request.apis.notices import Notices
from jmoe.server.request.decoding import converted, decode, unknown_fields
from jmoe.server.request.schema import ChatRequest


class Open(msgspec.Struct, kw_only=True):
    """A JSON object that may have other fields than its own."""


Body = TypeVar("Body", bound=Open)


def decode_open(raw: bytes, kind: type[Body], notices: Notices, route: str) -> Body:
    """Decodes the body of an API whose unknown fields have no effect.

    route: path of the API in the log.
    """
    body = decode(raw, kind)
    for name in unknown_fields(raw, kind):
        notices.tell_once(f"{route}: the field {name[:64]!r} is not known here and has no effect")
    return body


def chat_request(fields: dict[str, Any]) -> ChatRequest:
    """Makes a chat request from the fields of its JSON, of which those that are None are left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    body = converted(given, ChatRequest, "")
    for name in ("messages", "tools"):
        for each, source in zip(getattr(body, name) or (), given.get(name, ()), strict=True):
            each.__dict__["source"] = source
    return body


def thinking_fields(effort: str | None, is_on: bool | None) -> dict[str, Any]:
    """Returns the fields of a chat request that say how much the model thinks.

    effort: word such as "low"; None leaves it to the model.
    is_on: whether it thinks at all; None leaves it to the model.
    """
    return {"reasoning_effort": effort, "enable_thinking": is_on}


def function_tool(
    name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool | None
) -> dict[str, Any]:
    """Returns a function as a chat request's tool."""
    fields = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    function = {name: value for name, value in fields.items() if value is not None}
    return {"type": "function", "function": function}


def function_call(id: str, name: str, arguments: str | dict[str, Any]) -> dict[str, Any]:
    """Returns a call as an assistant's message has it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def named_function(name: str) -> dict[str, Any]:
    """Returns a ``tool_choice`` of one function."""
    return {"type": "function", "function": {"name": name}}


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Makes errors that are raised within the context name another API's fields.

    names: the other name of each of the chat's fields.
    """
    try:
        yield
    except ApiError as error:
        raise _renamed(error, names) from None


def _renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    field = (error.param or "").partition(".")[0].partition("[")[0]
    if field not in names:
        return error
    message = error.message.replace(field, names[field], 1)
    param = (error.param or "").replace(field, names[field], 1)
    return ApiError(error.status, message, param=param, code=error.code, headers=error.headers)
