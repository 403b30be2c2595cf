"""Failures that ``except Exception`` does not catch.

A panic in a Rust library (tokenizers, llguidance, safetensors) is a BaseException of pyo3. SystemExit and
KeyboardInterrupt, which a library may raise too, are BaseExceptions as well.
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
    """A BaseException that is not an Exception was raised; it is the cause of this error."""


def contained(function: Callable[..., Result], *args: Any) -> Result:
    """Returns what ``function`` returns, and raises only Exceptions. It is for threads, whose futures raise
    the error in an event loop, which survives only Exceptions."""
    try:
        return function(*args)
    except Exception:
        raise
    except BaseException as error:
        raise Panic(f"{type(error).__name__}: {error}") from error


def ends_program(error: BaseException) -> bool:
    """Returns whether the user or the program ends the program; only the main thread gets such errors."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and isinstance(error, KeyboardInterrupt | SystemExit)


def tell(listener: Callable[..., object], *args: Any) -> None:
    """Calls a listener. Its failure is logged and does not affect the caller."""
    try:
        listener(*args)
    except BaseException as error:
        if ends_program(error):
            raise
        log.exception("%s failed", getattr(listener, "__qualname__", listener))


@contextlib.contextmanager
def interrupt_ends_at_once() -> Iterator[None]:
    """Lets SIGINT end the process as SIGTERM does, until a server handles both.

    A KeyboardInterrupt waits until compiled code returns; while modules are imported it may become another
    error, or be lost if the interpreter ignores the errors of a callback.
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
