"""ASGI layers around the application: request ids, other origins' scripts and the API key."""

import asyncio
import hashlib
import re
import secrets
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jmoe.engine.faults import Panic
from jmoe.server.errors import ApiError

_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestId:
    """Answers with the client's ``x-request-id``, or a new one if the client sent no printable one."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        client_id = _header(scope, b"x-request-id")
        id = client_id if client_id is not None and _ID.fullmatch(client_id) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = id.decode("ascii")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", id)]}
            await send(message)

        await self.app(scope, receive, send_with_id)


class Origins(CORSMiddleware):
    """Lets scripts of these web pages use the server (CORS). It runs before the check of the API key, because
    a preflight request has no key."""

    def __init__(self, app: ASGIApp, origins: Collection[str]):
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=("x-request-id", "retry-after"),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Returns a refusal in the usual envelope."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        message = bytes(response.body).decode()
        return ApiError(400, message, code="disallowed_origin", headers={"Vary": "Origin"}).response()


class Contained:
    """Turns a failure that is not an Exception into one, so that the exception handlers answer it."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:  # a panic of a Rust library; SystemExit would end the event loop
            raise Panic(f"{type(error).__name__}: {error}") from error


class ApiKey:
    """Admits requests with the key and requests of ``open_paths``, and denies all others. The key is in
    ``Authorization: Bearer``, or in ``x-api-key`` as Anthropic's clients send it.

    It reads only ``scope["path"]``: headers could manipulate a URL rebuilt from them. It compares digests, in
    constant time, so that neither the key's length nor its beginning leaks.
    """

    def __init__(self, app: ASGIApp, key: str, open_paths: Collection[str]):
        self.app, self.open_paths = app, open_paths
        self.digest = hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] == "http" and scope["path"].removesuffix("/") in self.open_paths
        if scope["type"] == "lifespan" or is_open:
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        scheme, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
        sent = (key if scheme.lower() == b"bearer" else None, _header(scope, b"x-api-key"))
        if any(self._is_right(each) for each in sent):
            return await self.app(scope, receive, send)
        error = ApiError(
            401,
            "Incorrect API key provided: send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _is_right(self, key: bytes | None) -> bool:
        matches = secrets.compare_digest(hashlib.sha256((key or b"").strip()).digest(), self.digest)
        return matches and key is not None


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key.lower() == name), None)
