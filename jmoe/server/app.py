"""The ASGI application: the routes of the table, errors, middleware."""

import logging
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Scope

from jmoe.server.errors import ApiError, unavailable
from jmoe.server.routes.table import ROUTES
from jmoe.server.service import Service
from jmoe.server.watch.answered import AnswerReports
from jmoe.server.wire.connection_limit import RESOURCE_ERRORS
from jmoe.server.wire.middleware import ApiKey, Contained, Origins, RequestId

log = logging.getLogger(__name__)


class Slashed(Route):
    """A route that also answers its path with one more trailing slash, because some clients add it.

    It does not redirect: the target URL would be made from the Host header and lose a proxy's own prefix.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        if match is Match.NONE and scope["type"] == "http" and scope["path"].endswith("/"):
            return super().matches({**scope, "path": scope["path"][:-1]})
        return match, found


def make_app(service: Service) -> ASGIApp:
    endpoints = [(partial(route.handler, service), route) for route in ROUTES]
    routes = [Slashed(route.path, endpoint, methods=[route.method]) for endpoint, route in endpoints]
    handlers = {
        ApiError: partial(_api_error, service),
        HTTPException: _http_error,
        ClientDisconnect: _client_left,
        OSError: partial(_no_resources, service),
        Exception: _unexpected,
    }
    starlette = Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(Contained)])  # type: ignore[arg-type]
    starlette.router.redirect_slashes = False
    app: ASGIApp = starlette
    if service.settings.api_key is not None:
        app = ApiKey(app, service.settings.api_key, {route.path for route in ROUTES if route.is_open})
    if service.settings.allowed_origins:
        app = Origins(app, service.settings.allowed_origins)
    return RequestId(AnswerReports(app, dict(endpoints), service.observers))


async def _api_error(service: Service, request: Request, error: ApiError) -> Response:
    if error.status == 503:
        service.metrics.count_rejection(error.code or "other")
    return error.response()


async def _no_resources(service: Service, request: Request, error: OSError) -> Response:
    """Answers 503 when the system has run out of descriptors, memory or processes for the moment."""
    if error.errno not in RESOURCE_ERRORS:
        raise error
    log.error("a request was refused: %s", error.strerror)
    message = f"the server has no resources left for this request ({error.strerror})"
    return await _api_error(service, request, unavailable(message, "no_resources"))


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Answers Starlette's own 404 and 405 in the envelope; a 405 keeps its ``Allow``."""
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    path = request.scope["path"]
    message = f"{error.detail}: {request.method} {path[:200]}"
    if error.status_code == 404 and (near := _near(path.rstrip("/"))) is not None:
        message += f"; did you mean {near}?"
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


def _near(path: str) -> str | None:
    """Returns a route that the client may have meant: its base URL lacks /v1 or has too long a path."""
    paths = (route.path for route in ROUTES if "{" not in route.path)
    return next((p for p in paths if path and (p.endswith(path) or path.endswith(p))), None)


async def _unexpected(request: Request, error: Exception) -> Response:
    """Answers 500 without the exception's text, which may reveal too much; the request id finds it in the
    log."""
    id = request.scope.get("state", {}).get("request_id")
    log.error("request %s failed; its traceback follows", id)  # the server raises and logs it again
    return ApiError(500, f"internal error (request {id})", code="internal_error").response()
