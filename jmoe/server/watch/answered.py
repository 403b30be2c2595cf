"""Reports every HTTP answer after it has ended: to the metrics, the log and, if configured, traces."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jmoe.engine.faults import tell
from jmoe.server.answer.generation import Generation
from jmoe.server.route_record import Route

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """One answer that has ended.

    method: HTTP method of the request.
    route: route that answered; None for unknown paths and for requests refused before routing.
    status: HTTP status; it is 499 if the client left before there was one.
    seconds: time from the request to the answer's last byte.
    end_time: end time in seconds since 1970.
    request_id: id from the client or made by the server.
    headers: headers of the request.
    generation: generation that the handler began; None if it began none.
    """

    method: str
    route: Route | None
    status: int
    seconds: float
    end_time: float
    request_id: str
    headers: Mapping[str, str]
    generation: Generation | None

    @property
    def pattern(self) -> str:
        """The route's pattern, such as "/v1/models/{id}", or "unknown"."""
        return "unknown" if self.route is None else self.route.pattern

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens, with each distinct prompt counted once, as in the answer's usage."""
        if self.generation is None:
            return 0
        prompts = {id(request.prompt_token_ids): request for request in self.generation.requests}
        return sum(len(request.prompt_token_ids) for request in prompts.values())

    @property
    def answer_tokens(self) -> int:
        return sum(len(r.token_ids) for r in self.generation.requests) if self.generation else 0


Observer = Callable[[Answered], None]


class AnswerReports:
    """Reports each answer to ``observers``.

    A handler that begins a generation stores it in the request's state.

    routes: route of each endpoint.
    """

    def __init__(self, app: ASGIApp, routes: Mapping[Any, Route], observers: Sequence[Observer]):
        self.app, self.routes, self.observers = app, routes, observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.monotonic(), 499

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_seen)
        finally:
            answer = self._record(scope, status, time.monotonic() - started)
            for observer in self.observers:
                tell(observer, answer)

    def _record(self, scope: Scope, status: int, seconds: float) -> Answered:
        state = scope["state"]
        return Answered(
            scope["method"],
            self.routes.get(scope.get("endpoint")),
            status,
            seconds,
            time.time(),
            state["request_id"],
            {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]},
            state.get("generation"),
        )


def log_answer(answer: Answered) -> None:
    if answer.route is not None and answer.route.is_quiet:
        return
    fields: dict[str, Any] = {
        "request_id": answer.request_id,
        "method": answer.method,
        "route": answer.pattern,
        "status": answer.status,
        "ms": round(answer.seconds * 1000, 1),
    }
    if answer.generation is not None:
        fields |= {"prompt_tokens": answer.prompt_tokens, "tokens": answer.answer_tokens}
    log.info("answered", extra={"fields": fields})
