"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``, all four keys always.

On the paths of Anthropic's API they have its shape: ``{"type": "error", "error": {"type", "message"}}``.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

ANTHROPIC_PATH = "/v1/messages"  # this path, and those below it
AnthropicKind = Literal[
    "invalid_request_error", "authentication_error", "not_found_error", "request_too_large", "api_error",
    "overloaded_error",
]  # fmt: skip
ANTHROPIC_KINDS: Mapping[int, AnthropicKind] = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}
CONTEXT_PHRASE = "This model's maximum context length"  # clients recognise the case by these words
LIMIT_FIELDS = "allowed_token_ids", "bad_words"  # fields that only the engine checks whole


class ErrorDetail(msgspec.Struct, forbid_unknown_fields=True):
    """An error of a request.

    message: text for people.
    type: invalid_request_error or server_error.
    param: path of the wrong field; null if no field is wrong.
    code: word for programs; null if the status is enough.
    """

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class Error(msgspec.Struct, forbid_unknown_fields=True):
    error: ErrorDetail


class AnthropicDetail(msgspec.Struct, forbid_unknown_fields=True):
    type: AnthropicKind
    message: str


class AnthropicError(msgspec.Struct, forbid_unknown_fields=True):
    """An error of a request to the Messages API, and the event of a stream that fails."""

    type: Literal["error"]
    error: AnthropicDetail


class ApiError(Exception):
    """An answer other than 200. ``param`` names the request field, ``code`` is a word or None."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def envelope(self) -> Error:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return Error(ErrorDetail(self.message, kind, self.param, self.code))

    def anthropic(self) -> AnthropicError:
        default: AnthropicKind = "api_error" if self.status >= 500 else "invalid_request_error"
        return AnthropicError(
            "error", AnthropicDetail(ANTHROPIC_KINDS.get(self.status, default), self.message)
        )

    def response(self) -> Response:
        return ErrorResponse(self)


class ErrorResponse(Response):
    """An error in the shape of the API that the request's path belongs to."""

    media_type = "application/json"

    def __init__(self, error: ApiError):
        super().__init__(msgspec.json.encode(error.envelope()), error.status, error.headers)
        self.error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not f"{scope['path']}/".startswith(f"{ANTHROPIC_PATH}/"):
            return await super().__call__(scope, receive, send)
        error = self.error
        await json_response(error.anthropic(), error.status, error.headers)(scope, receive, send)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="unsupported_parameter")


def refused(error: ValueError, param: str) -> ApiError:
    """Returns a 400 for a prompt that the engine refused, or for the field of ``LIMIT_FIELDS`` that the error
    begins with."""
    text = str(error)
    param = next((field for field in LIMIT_FIELDS if text.startswith(field)), param)
    code = "context_length_exceeded" if text.startswith(CONTEXT_PHRASE) else "invalid_value"
    return invalid(text, param, code)


def unavailable(message: str, code: str) -> ApiError:
    """Returns a 503 after which a retry may succeed: usual clients wait as long as ``Retry-After`` says."""
    return ApiError(503, message, code=code, headers={"Retry-After": "1"})


def draining() -> ApiError:
    """Returns a 503 that closes the connection: a load balancer should send the next request elsewhere."""
    error = unavailable("the server is shutting down", "draining")
    error.headers["Connection"] = "close"
    return error


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"the answer was not complete after {seconds:g} seconds", code="timeout")


def engine_dead() -> ApiError:
    return ApiError(503, "the engine has stopped; the server's log has the cause", code="engine_dead")
