"""An OpenAI-compatible server on loopback whose answers are given: what it was sent is recorded."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from support.server.loopback import answering

NAME = "scripted"


@dataclass
class Scripted:
    """The server's answers and what it was asked.

    answers: deltas of each answer, in order; an int is the status of a refusal, None waits for the client
        to leave.
    bodies: bodies of the chat requests.
    keys: the ``Authorization`` of every request.
    left: set when a client has left in the middle of an answer.
    """

    answers: list[list[dict[str, Any] | None] | int] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    url: str = ""


@contextmanager
def serving(script: Scripted) -> Iterator[Scripted]:
    """Yields the script while a server follows it."""

    class Handler(_Handler):
        pass

    Handler.script = script
    with answering(Handler) as script.url:
        yield script


class _Handler(http.server.BaseHTTPRequestHandler):
    script: Scripted

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the tests' output clean."""

    def do_GET(self) -> None:
        self.script.keys.append(self.headers["Authorization"])
        if self.path != "/v1/models":
            return self._json(404, {"error": {"message": "no such route"}})
        self._json(200, {"data": [{"id": NAME, "owned_by": "jmoe", "max_model_len": 4096}]})

    def do_POST(self) -> None:
        self.script.keys.append(self.headers["Authorization"])
        self.script.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        answer = self.script.answers.pop(0)
        if isinstance(answer, int):
            return self._json(answer, {"error": {"message": "not\nnow"}})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for delta in answer:
            if delta is None:
                return self._wait()
            event = delta if "error" in delta else {"choices": [{"index": 0, "delta": delta}]}
            self.wfile.write(f": a comment\r\ndata: {json.dumps(event)}\r\n\r\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _wait(self) -> None:
        """Waits until the client closes its connection."""
        self.connection.settimeout(20)
        if self.connection.recv(1) == b"":
            self.script.left.set()

    def _json(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
