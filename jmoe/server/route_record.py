"""The type of the entries of the route table (``routes.table``).

It is below the layers that observe and limit connections, because these read it too.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from jmoe.server.errors import Error

JSON, EVENTS = "application/json", "text/event-stream"
Shared = TypeVar("Shared")  # what the handlers share; the table's is ``Service``


@dataclass(frozen=True)
class Route(Generic[Shared]):
    """All that is known about one route.

    method: HTTP method; a GET route answers HEAD too.
    path: path pattern of Starlette, such as "/v1/models/{id:path}".
    handler: function that makes the answer.
    summary: line for the OpenAPI document; None leaves the route out of it.
    answers: types of the answer with status 200, by content type; for EVENTS the type of an event's data.
    errors: other statuses of answers, except 401 and 500.
    error: type of other answers.
    body: type of the request's body; None if it takes none.
    example: body that works.
    is_open: whether it needs no API key; such a path has no variables.
    is_quiet: whether its answers are not logged.
    is_probe: whether it reports health, so that it is answered beyond the limit on connections too.
    operation: name of the operation in traces; None if it is not traced.
    has_named_events: whether the events of its streams have names, and no ``[DONE]`` follows them.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Callable[[Shared, Request], Awaitable[Response]]
    summary: str | None
    answers: Mapping[str, type]
    errors: tuple[int, ...] = ()
    body: type | None = None
    example: Mapping[str, Any] | None = None
    is_open: bool = False
    is_quiet: bool = False
    is_probe: bool = False
    operation: str | None = None
    error: type = Error
    has_named_events: bool = False

    @cached_property
    def pattern(self) -> str:
        """The path as written in documents, metrics and logs, such as "/v1/models/{id}"."""
        return compile_path(self.path)[1]
