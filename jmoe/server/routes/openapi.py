"""The OpenAPI document: bodies are the structs that check the requests, answers those
that the answers are made of."""

from collections.abc import Sequence
from typing import Any

import msgspec

from jmoe.server.answer.info_replies import Model
from jmoe.server.route_record import EVENTS, JSON, Route

ERRORS = {
    400: "The request is wrong; param names the field",
    401: "The key is missing or wrong",
    404: "There is no such model, or no such stored answer",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "Content-Type is not application/json, or Content-Encoding is not gzip",
    500: "The server failed; the message has an id to find in its log",
    503: "The queue is full, or the server is stopping",
}


def openapi_document(
    routes: Sequence[Route], version: str, models: Sequence[str], *, with_key: bool
) -> dict[str, Any]:
    """Returns a JSON-able OpenAPI 3.1 document of the routes that have a summary.

    models: served model names.
    """
    described = [route for route in routes if route.summary is not None]
    bodies = {route.body for route in described if route.body is not None}
    kinds = {kind for route in described for kind in route.answers.values()} | bodies
    kinds |= {route.error for route in described}
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    found, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(ordered, found, strict=True))
    for properties in (components[body.__name__]["properties"] for body in bodies):
        if "model" in properties:
            properties["model"] = {"enum": [None, *models], "default": None}
    paths: dict[str, dict[str, Any]] = {}
    for route in described:
        operations = paths.setdefault(route.pattern, {})
        operations[route.method.lower()] = _operation(route, schemas, models[0], with_key)
    document = {"openapi": "3.1.0", "info": {"title": "jmoe", "version": version}, "paths": paths}
    keys = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if with_key else {}
    return document | {"components": {"schemas": components, **keys}}


def _operation(route: Route, schemas: dict[type, Any], model: str, with_key: bool) -> dict[str, Any]:
    guarded = with_key and not route.is_open
    error = {JSON: {"schema": schemas[route.error]}}
    statuses = sorted((*route.errors, 500, 401) if guarded else (*route.errors, 500))
    responses = {"200": {"description": "OK", "content": _content(route, schemas)}}
    responses |= {str(s): {"description": ERRORS[s], "content": error} for s in statuses}
    described: dict[str, Any] = {"summary": route.summary, "responses": responses}
    if guarded:
        described["security"] = [{"key": []}]
    if route.body is not None:
        content = {"schema": schemas[route.body], "example": route.example}
        described["requestBody"] = {"required": True, "content": {JSON: content}}
    if "{id}" in route.pattern:
        text = {"type": "string", "minLength": 1}
        parameter = {"name": "id", "in": "path", "required": True, "schema": text}
        if route.answers[JSON] is Model:
            parameter["example"] = model
        described["parameters"] = [parameter]
    return described


def _content(route: Route, schemas: dict[type, Any]) -> dict[str, Any]:
    content = {form: {"schema": schemas[kind]} for form, kind in route.answers.items()}
    if EVENTS in content:
        chunk, error = schemas[route.answers[EVENTS]], schemas[route.error]
        content[EVENTS] = {"schema": _named(chunk, error) if route.has_named_events else _event(chunk, error)}
    return content


def _data(chunk: Any, error: Any) -> dict[str, Any]:
    return {
        "type": "string",
        "description": "A chunk, or an error where the answer fails",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [chunk, error]},
    }


def _named(chunk: Any, error: Any) -> dict[str, Any]:
    """Returns one event of a stream whose events have names."""
    properties = {"event": {"type": "string"}, "data": _data(chunk, error)}
    return {"type": "object", "required": ["event", "data"], "properties": properties}


def _event(chunk: Any, error: Any) -> dict[str, Any]:
    """Returns one server-sent event of a stream."""
    json = _data(chunk, error)
    last = {"const": "[DONE]", "description": "In the last event"}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [last, json]}}}
