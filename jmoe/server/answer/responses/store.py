"""The answers of the Responses API that later requests may refer to, in bounded memory."""

import threading
from dataclasses import dataclass
from typing import Any

import msgspec

from jmoe.server.answer.responses.replies import ResponseReply

MAX_RESPONSES = 256
MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class StoredResponse:
    """JSON texts of one answer.

    reply: the answer.
    given: list of the items before it.
    made: list of its own items.
    """

    reply: bytes
    given: bytes
    made: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.reply) + len(self.given) + len(self.made)

    def items(self) -> list[dict[str, Any]]:
        """Returns the conversation including the answer."""
        return [*msgspec.json.decode(self.given), *msgspec.json.decode(self.made)]


class ResponseStore:
    """Keeps the newest answers. Any thread may use it."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES):
        self.max_responses, self.max_bytes, self.num_bytes = max_responses, max_bytes, 0
        self.responses: dict[str, StoredResponse] = {}  # the oldest first
        self.owners: dict[str, str] = {}  # id of the answer that an item is in, by the item's id
        self.lock = threading.Lock()

    def keep(self, reply: ResponseReply, given: bytes) -> None:
        """Stores an answer in the place of the oldest ones.

        given: JSON list of the items before it.
        """
        stored = StoredResponse(msgspec.json.encode(reply), given, msgspec.json.encode(reply.output))
        with self.lock:
            self.responses[reply.id] = stored
            self.num_bytes += stored.num_bytes
            self.owners |= {item.id: reply.id for item in reply.output}
            while len(self.responses) > self.max_responses or self.num_bytes > self.max_bytes:
                self._drop(next(iter(self.responses)))

    def get(self, id: str) -> StoredResponse | None:
        with self.lock:
            return self.responses.get(id)

    def item(self, id: str) -> dict[str, Any] | None:
        """Returns an item of an answer."""
        with self.lock:
            stored = self.responses.get(self.owners.get(id, ""))
        items = [] if stored is None else msgspec.json.decode(stored.made)
        return next((item for item in items if item["id"] == id), None)

    def delete(self, id: str) -> bool:
        """Forgets an answer; returns whether it was there."""
        with self.lock:
            return id in self.responses and self._drop(id)

    def _drop(self, id: str) -> bool:
        stored = self.responses.pop(id)
        self.num_bytes -= stored.num_bytes
        for item in msgspec.json.decode(stored.made):
            self.owners.pop(item["id"], None)
        return True
