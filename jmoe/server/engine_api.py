"""What the server knows of an engine. Requests and outputs are plain data; nothing of jax is seen here."""

from collections.abc import Iterable
from typing import Any, Protocol

from jmoe.engine.request import EngineSnapshot, Request, StepReport
from jmoe.engine.text.codec import TextCodec


class Listener(Protocol):
    """Told of every token, end and step, from the engine's thread."""

    def token(self, request: Request, now: float) -> None: ...
    def stepped(self, report: StepReport) -> None: ...
    def finished(self, request: Request, reason: str) -> None: ...


class EngineProtocol(Protocol):
    """An engine that runs by itself. Every method may be called from any thread.

    codec: None = the model has no tokenizer, prompts are token ids. end_ids: its end-of-text tokens.
    submit: queues all or none; raises ValueError (one line, safe to show), QueueFull or EngineDead. It and
    moe_stats may wait for a running step, so they are called off the event loop.
    abort: idempotent. snapshot: never waits.
    """

    @property
    def codec(self) -> TextCodec | None: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_ids(self) -> frozenset[int]: ...

    def submit(self, requests: list[Request]) -> None: ...
    def abort(self, request_ids: Iterable[str]) -> None: ...
    def snapshot(self) -> EngineSnapshot: ...
    def moe_stats(self) -> dict[str, Any]: ...
    def add_listener(self, listener: Listener) -> None: ...
