"""What the server knows of an engine. Requests and outputs are plain data without any jax type."""

from collections.abc import Iterable
from typing import Any, Protocol

from jmoe.engine.request import EngineSnapshot, Listener, Request
from jmoe.engine.text.codec import TextCodec


class EngineProtocol(Protocol):
    """An engine that runs by itself. Every method may be called from any thread.

    codec: the model's text codec; None = the model has no tokenizer and prompts are token ids.
    end_ids: the model's end-of-text tokens.
    submit: queues all requests or none; raises ValueError (one line, safe to show), QueueFull or EngineDead.
        It may wait for a running step, so it is called off the event loop.
    abort: ends requests; it is idempotent.
    snapshot: returns the engine's present state and never waits.
    moe_stats: returns the expert statistics; it may wait for a running step, as ``submit``.
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
