"""Failures that no ``except Exception`` sees.

A panic in a Rust library (tokenizers, llguidance, safetensors) is a BaseException of pyo3's, and so are
SystemExit and KeyboardInterrupt, which a library may raise as well.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Panic(Exception):
    """Something ended with what is no Exception; that is its cause."""


def contained(function: Callable[..., Result], *given: Any) -> Result:
    """What ``function`` returns. All that it may raise is an Exception: for threads, whose futures bring it
    into an event loop, which only an Exception leaves alive."""
    try:
        return function(*given)
    except Exception:
        raise
    except BaseException as error:
        raise Panic(f"{type(error).__name__}: {error}") from error


def ends_program(error: BaseException) -> bool:
    """Whether it is the user's or the program's own wish: both come to the main thread alone."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and isinstance(error, KeyboardInterrupt | SystemExit)


def tell(hear: Callable[..., object], *told: Any) -> None:
    """Calls one that only listens. Its failure is logged, and ends nothing of the caller's."""
    try:
        hear(*told)
    except BaseException as error:
        if ends_program(error):
            raise
        log.exception("%s failed", getattr(hear, "__qualname__", hear))


@contextlib.contextmanager
def interrupt_ends_at_once() -> Iterator[None]:
    """SIGINT ends the process as SIGTERM does, until a server handles both.

    A KeyboardInterrupt waits for what is compiled; while modules are imported it may come out as another
    error or be lost, where the interpreter ignores the errors of a callback.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
