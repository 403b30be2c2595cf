"""Failures that no ``except Exception`` sees.

A panic in a Rust library (tokenizers, llguidance, safetensors) is a BaseException of pyo3's, and so are
SystemExit and KeyboardInterrupt, which a library may raise as well.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Result = TypeVar("Result")
ENDING = (KeyboardInterrupt, SystemExit)  # in a program's main thread these are its user's or its own


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


def tell(hear: Callable[..., object], *told: Any) -> None:
    """Calls one that only listens. Its failure is logged, and ends nothing of the caller's."""
    try:
        hear(*told)
    except ENDING:
        raise
    except BaseException:
        log.exception("%s failed", getattr(hear, "__qualname__", hear))
