"""Counts the compilations after warm-up, when nothing should be left to compile."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class CompilationCounter:
    """Compilations inside ``watch`` after warm-up, as jax itself reports them.

    jax reports every compilation of the process; those of another model or other code are not the runner's.
    """

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.after_warm_up = 0
        self._warm, self._open = False, True
        self._watched: int | None = None  # the thread that is in ``watch``
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def warm_up_done(self) -> None:
        """Starts to count."""
        self._warm = True

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Counts what this thread compiles inside."""
        self._watched = threading.get_ident()
        try:
            yield
        finally:
            self._watched = None

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if self._warm and event == self.EVENT and threading.get_ident() == self._watched:
            self.after_warm_up += 1

    def close(self) -> None:
        """Stops listening; safe to call again."""
        if self._open:
            jax.monitoring.unregister_event_duration_listener(self._heard)
        self._open = False
