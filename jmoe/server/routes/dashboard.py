"""GET /dashboard, /moe/events and /moe/stats: one page and the reports that it shows."""

import asyncio
import secrets
from contextlib import aclosing, suppress
from importlib import resources
from typing import get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jmoe.config.counters import LOSSY, names
from jmoe.engine.request import EngineDead
from jmoe.server.answer.generation import ClientLeft, unless_client_leaves
from jmoe.server.answer.pieces import PiecesResponse, encoded, joined
from jmoe.server.errors import engine_dead, invalid, unavailable
from jmoe.server.service import Service
from jmoe.server.watch.poll import LONGEST, Poll, SnapshotFailed
from jmoe.server.watch.snapshots import ReportPhase

WINDOW = 10  # seconds of a report if the listener requests no window
LISTENERS = 64  # at the same time
WRITE_TIMEOUT = 10.0  # seconds in which a listener must take some of what is sent to it
POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def page(service: Service, request: Request) -> Response:
    """Returns the page. It holds no data and needs no API key: the page requests one from the user, because
    its events need one."""
    file = resources.files("jmoe.server.routes").joinpath("dashboard.html")
    text = await service.in_thread(lambda: file.read_text(encoding="utf-8"))
    nonce = secrets.token_urlsafe(16)
    lossy = msgspec.json.encode(names(LOSSY)).decode()
    headers = {
        "content-security-policy": POLICY.format(nonce),
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return Response(
        text.replace("{nonce}", nonce).replace("{lossy}", lossy), headers=headers, media_type="text/html"
    )


async def stats(service: Service, request: Request) -> Response:
    """Returns expert statistics since the start; with ``window`` or ``phase`` one report of the last
    seconds."""
    try:
        if not request.query_params:
            stats = service.engine.moe_stats
            return PiecesResponse(await service.in_thread(lambda: list(joined(encoded(stats())))))
        window, phase = _window_and_phase(request)
        report = await service.poll.report(window, phase)
    except EngineDead:
        raise engine_dead() from None
    return Response(report, media_type="application/json", headers={"cache-control": "no-store"})


async def events(service: Service, request: Request) -> Response:
    """Sends a report of the last ``window`` seconds every second, as a server-sent event."""
    window, phase = _window_and_phase(request)
    service.check_alive()
    if request.method == "HEAD":
        return Response(media_type="text/event-stream")
    if service.poll.num_listeners >= LISTENERS:
        raise unavailable(f"{LISTENERS} listeners at a time at most", "too_many_listeners")
    return ReportStream(service.poll, window, phase)


def _window_and_phase(request: Request) -> tuple[int, ReportPhase]:
    query = request.query_params
    unknown = next((name for name in query if name not in ("window", "phase")), None)
    if unknown is not None:
        raise invalid(f"unknown parameter {unknown[:50]!r}; known are window and phase", unknown[:50])
    return _window(query.get("window", str(WINDOW))), _phase(query.get("phase", "all"))


def _window(text: str) -> int:
    seconds = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 0
    if not 1 <= seconds <= LONGEST:
        raise invalid(f"window must be a whole number of seconds from 1 to {LONGEST}", "window")
    return seconds


def _phase(text: str) -> ReportPhase:
    found = next((phase for phase in get_args(ReportPhase) if phase == text), None)
    if found is None:
        raise invalid(f"phase must be one of {', '.join(get_args(ReportPhase))}", "phase")
    return found


class ReportStream(Response):
    """A stream of reports. It ends when the client leaves or does not read, or when the server ends."""

    def __init__(self, poll: Poll, window: int, phase: ReportPhase):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]  # unknown; the server sends chunks
        self.reports = poll.reports(window, phase)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_part(part: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": part, "more_body": more}
            await asyncio.wait_for(send(message), WRITE_TIMEOUT)

        async def send_all() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self.reports) as reports:
                async for report in reports:
                    await send_part(b"data: " + report + b"\n\n")
            await send_part(b"", more=False)

        with suppress(ClientLeft, TimeoutError, SnapshotFailed):
            await unless_client_leaves(receive, send_all())
