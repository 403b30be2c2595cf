"""The interface of an engine for the server. Requests and outputs are plain data without any jax type."""

from collections.abc import Iterable
from typing import Any, Protocol

from jmoe.engine.reports import EngineSnapshot, Listener, ModelFacts
from jmoe.engine.request import Request


class EngineProtocol(Protocol):
    """An engine that runs by itself. Every method may be called from any thread.

    facts: what the server needs to know of the model.
    submit: queues all requests or none; raises ValueError (one line, safe to show), QueueFull or EngineDead.
        It may wait for a running step, so it is called off the event loop.
    abort: ends requests; it is idempotent.
    snapshot: returns the engine's present state and never waits.
    moe_stats: returns the expert statistics; it may wait for a running step, as ``submit``.
    """

    @property
    def facts(self) -> ModelFacts: ...

    def submit(self, requests: list[Request]) -> None: ...
    def abort(self, request_ids: Iterable[str]) -> None: ...
    def snapshot(self) -> EngineSnapshot: ...
    def moe_stats(self) -> dict[str, Any]: ...
    def add_listener(self, listener: Listener) -> None: ...
