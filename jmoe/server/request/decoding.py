"""From a body's bytes to a struct of ``schema``. Every failure is a 400 that names its cause; null means the
absence of a field, also for fields that a struct does not have."""

import functools
import re
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from jmoe.server.errors import ApiError, invalid
from jmoe.server.request.bounds import check_json
from jmoe.server.request.fields.base import WithSource

Body = TypeVar("Body", bound=msgspec.Struct)
_PLACE = re.compile(r"(?P<what>.*) - at `\$\.?(?P<path>.*)`", re.DOTALL)
_FIELD = re.compile(r"Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)
_SURROGATES = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(\\u[dD][c-fC-F][0-9a-fA-F]{2})?")


def decode(raw: bytes, kind: type[Body]) -> Body:
    """Decodes the body as ``kind``. A 400 has the code invalid_json if the body is no JSON object; otherwise
    it names the field."""
    check_json(raw)
    try:
        body = _decoded(raw, kind)
        _keep_source(body, raw)
        return body
    except msgspec.ValidationError as error:
        raise bad_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else "not valid UTF-8"
        if isinstance(error, msgspec.DecodeError):
            cause = _lone_surrogate(raw) or str(error)
        raise invalid(f"the request body cannot be read as JSON: {cause}", code="invalid_json") from None


def _decoded(raw: bytes, kind: type[Body]) -> Body:
    """Decodes the body; a null field that ``kind`` does not have counts as absent. Only a body with an
    unknown field is decoded twice."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        if not str(error).startswith("Object contains unknown field"):
            raise
    return msgspec.convert(without_unknown_nulls(msgspec.json.decode(raw), kind), kind)


def without_unknown_nulls(value: Any, kind: type) -> Any:
    """Returns JSON ``value`` of type ``kind`` without the null fields that its structs do not have.

    Values other than structs are data and stay as they are: maps, schemas, lists of numbers.
    """
    return _pruned(value, _shape(kind))


@functools.cache
def _shape(kind: type) -> inspect.Type:
    return inspect.type_info(kind)


def _pruned(value: Any, shape: inspect.Type) -> Any:
    shapes = shape.types if isinstance(shape, inspect.UnionType) else (shape,)
    if isinstance(value, list):
        items = next((s.item_type for s in shapes if isinstance(s, inspect.ListType)), None)
        return [_pruned(v, items) for v in value] if isinstance(items, inspect.StructType) else value
    struct = next((s for s in shapes if isinstance(s, inspect.StructType) and _matches(value, s)), None)
    if struct is None:
        return value
    known: dict[str, inspect.Type] = {field.encode_name: field.type for field in struct.fields}
    kept = {name: v for name, v in value.items() if v is not None or name in known}
    return {name: _pruned(v, known[name]) if name in known else v for name, v in kept.items()}


def _matches(value: Any, struct: inspect.StructType) -> bool:
    return isinstance(value, dict) and (struct.tag_field is None or value.get(struct.tag_field) == struct.tag)


class _Conversation(msgspec.Struct):
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


def _keep_source(body: msgspec.Struct, raw: bytes) -> None:
    """Stores in each message and tool of ``body`` the JSON object that it is decoded from."""
    values = {name: getattr(body, name, None) for name in _Conversation.__struct_fields__}
    kept = [name for name, value in values.items() if value and isinstance(value[0], WithSource)]
    if kept:
        sources = msgspec.json.decode(raw, type=_Conversation)
        for name in kept:
            for each, source in zip(getattr(body, name), getattr(sources, name), strict=True):
                each.__dict__["source"] = source


def _lone_surrogate(raw: bytes) -> str | None:
    """Names half a surrogate pair as the cause: at a string's end the decoder reports truncated input."""
    alone = any(found[1] is None for found in _SURROGATES.finditer(raw))
    return "a \\u escape is half of a surrogate pair" if alone else None


def unknown_fields(raw: bytes, kind: type[msgspec.Struct]) -> list[str]:
    """Returns the names of the body's fields that ``kind`` does not have."""
    names = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    return [name for name in names if name not in kind.__struct_encode_fields__]


def converted(value: Any, kind: type[Body], where: str) -> Body:
    """Returns JSON ``value`` as ``kind``; a 400 names the field after ``where``."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise bad_field(str(error), where) from None


def bad_field(text: str, where: str = "") -> ApiError:
    """Returns a 400 from a message of msgspec.

    where: path of the value that the message's path begins at; "" = the body.
    """
    if len(text) > 4096:  # a name may have megabytes; the path is at the end
        text = text[:2048] + text[-2048:]
    place = _PLACE.fullmatch(text)
    what, path = (place["what"], place["path"]) if place else (text, "")
    path = ".".join(each for each in (where, path) if each).replace(".[", "[")
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
