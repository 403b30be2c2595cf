"""An engine on its own thread: submit and abort from any thread; results come through ``Request.emit``."""

import logging
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from jmoe.engine.engine import Engine
from jmoe.engine.faults import contained, tell
from jmoe.engine.reports import EngineSnapshot, Listener, ModelFacts
from jmoe.engine.request import EngineDead, FinishReason, Request

log = logging.getLogger(__name__)


class EngineWorker:
    """Owns the only thread on which the engine runs. Calls are executed between two steps.

    Whatever ends that thread, no caller waits for it afterwards: calls end with EngineDead, requests with a
    last output that names the cause, and ``snapshot`` reports that it is not alive.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self.facts = ModelFacts(engine.codec, engine.max_model_len, engine.vocab_size, engine.end_ids)
        self._calls: list[tuple[Any, Future]] = []
        self._condition = threading.Condition()
        self._is_closing = False
        self._death_cause: str | None = None
        self._thread = threading.Thread(target=self._loop, name="jmoe-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, requests: list[Request]) -> None:
        """Queues all or none of the requests; raises ValueError (bad request), QueueFull or EngineDead."""
        self._engine.check(requests)  # on the caller's thread, so that long prompts delay no step
        self._call(lambda: self._engine.enqueue(requests))

    def abort(self, request_ids: Iterable[str]) -> None:
        ids = list(request_ids)
        if self._death_cause is None:
            self._post(lambda: [tell(self._engine.abort, i) for i in ids])

    def snapshot(self) -> EngineSnapshot:
        """Returns a snapshot without waiting for a step to end: each number is right, but they may be one
        step apart."""
        s = self._engine.snapshot()
        return replace(s, is_alive=s.is_alive and self._death_cause is None and self._thread.is_alive())

    def moe_stats(self) -> dict[str, Any]:
        return self._call(self._engine.moe_stats)

    def add_listener(self, listener: Listener) -> None:
        self._engine.listeners.append(listener)

    def close(self) -> None:
        """Stops the thread after the current step, aborts what still runs and closes the engine."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        self._thread.join()
        self._engine.close()

    def _post(self, call: Any) -> Future:
        future: Future = Future()
        with self._condition:
            if self._death_cause is not None or self._is_closing:
                raise EngineDead(self._death_cause or "the engine is shutting down")
            self._calls.append((call, future))
            self._condition.notify()
        return future

    def _call(self, call: Any) -> Any:
        return self._post(call).result()

    def _loop(self) -> None:
        cause, reason = "the engine failed; the server's log has the cause", "error"
        try:
            while self._run_calls():
                self._engine.step()
            cause, reason = "the engine is shutting down", "abort"
        except BaseException as error:  # a panic of a Rust library is no Exception
            self._death_cause = cause  # first, because logging takes memory and may fail too
            log.critical("the engine's thread ended: %s", type(error).__name__, exc_info=error)
        finally:
            self._stop(cause, reason)

    def _run_calls(self) -> bool:
        """Runs the posted calls, and waits for one if the engine has nothing to do. Returns False when
        closing."""
        with self._condition:
            while not (self._calls or self._is_closing or self._engine.busy):
                self._condition.wait()
            calls, self._calls = self._calls, []
            closing = self._is_closing
        for call, future in calls:
            try:
                future.set_result(contained(call))
            except Exception as error:  # raised in the caller, who handles it
                future.set_exception(error)
        return not closing

    def _stop(self, cause: str, reason: FinishReason) -> None:
        with self._condition:
            self._death_cause = cause
            calls, self._calls = self._calls, []
        for _, future in calls:
            future.set_exception(EngineDead(cause))
        self._engine.give_up(reason, cause)
