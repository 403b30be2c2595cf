"""Chat answers that are calls of functions, whole and as increments of a stream."""

import secrets
import string
from collections.abc import Sequence
from typing import Any

from jmoe.engine.request import Output
from jmoe.server.answer.formats import ChatFormat
from jmoe.server.request.schema import Function
from jmoe.server.request.tools import CallReader

ALPHABET = string.ascii_letters + string.digits


def call_id() -> str:
    """Nine letters and digits: some models' templates demand exactly this of the ids in a conversation."""
    return "".join(secrets.choice(ALPHABET) for _ in range(9))


class ToolFormat:
    """An ``AnswerFormat``: each choice is one call of one of ``functions``.

    named: whether the request named the function. Such an answer ends with the reason "stop"; an answer whose
    function the model chose ends with "tool_calls", as OpenAI's do.
    """

    def __init__(self, chat: ChatFormat, functions: list[Function], *, named: bool):
        self.chat, self.named = chat, named
        self.object, self.chunk_object = chat.object, chat.chunk_object
        self.readers = [CallReader(functions, named) for _ in range(chat.n)]
        self.begun = [False] * chat.n
        self.ids = [call_id() for _ in range(chat.n)]

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": None}
        return [{"index": i, "delta": delta, "finish_reason": None} for i in range(self.chat.n)]

    def delta(self, index: int, output: Output) -> dict[str, Any]:
        reader = self.readers[index]
        piece, call = reader.feed(output.text), {}
        if reader.name is not None and not self.begun[index]:
            call = self._call(index, reader.name, piece)
        elif piece:
            call = {"function": {"arguments": piece}}
        self.begun[index] = reader.name is not None
        calls = {"tool_calls": [{"index": 0, **call}]} if call else {}
        return self._ended(index, self.chat.delta(index, output) | {"delta": calls})

    def choice(self, index: int, outputs: Sequence[Output]) -> dict[str, Any]:
        """An answer cut before its function's name was whole has no call."""
        reader = self.readers[index]
        arguments = "".join(reader.feed(output.text) for output in outputs)
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        if reader.name is not None:
            message["tool_calls"] = [self._call(index, reader.name, arguments)]
        return self._ended(index, self.chat.choice(index, outputs) | {"message": message})

    def _call(self, index: int, name: str, arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {"id": self.ids[index], "type": "function", "function": function}

    def _ended(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        if choice["finish_reason"] == "stop" and not self.named and self.readers[index].ended:
            choice["finish_reason"] = "tool_calls"
        return choice
