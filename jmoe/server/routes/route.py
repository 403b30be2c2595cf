"""The type of the entries of the route table."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from jmoe.server.service import Service

JSON, EVENTS = "application/json", "text/event-stream"
Handler = Callable[[Service, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Route:
    """All that is known about one route.

    method: HTTP method; a GET route answers HEAD too.
    path: path pattern of Starlette, such as "/v1/models/{id:path}".
    handler: function that makes the answer.
    summary: line for the OpenAPI document; None leaves the route out of it.
    answers: types of the answer with status 200, by content type; for EVENTS the type of an event's data.
    errors: other statuses of answers, except 401 and 500.
    body: type of the request's body; None if it takes none.
    example: body that works.
    is_open: whether it needs no API key; such a path has no variables.
    is_quiet: whether its answers are not logged.
    operation: name of the operation in traces; None if it is not traced.
    """

    method: Literal["GET", "POST"]
    path: str
    handler: Handler
    summary: str | None
    answers: Mapping[str, type]
    errors: tuple[int, ...] = ()
    body: type | None = None
    example: Mapping[str, Any] | None = None
    is_open: bool = False
    is_quiet: bool = False
    operation: str | None = None

    @property
    def pattern(self) -> str:
        """The path as written in documents, metrics and logs, such as "/v1/models/{id}"."""
        return compile_path(self.path)[1]
