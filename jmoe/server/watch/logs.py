"""The format of log lines: text, or one JSON object per line. Text from a client cannot begin a new line."""

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Any, Literal

from jmoe.config.reading import typed

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

log = logging.getLogger(__name__)


def configure(form: str, level: str) -> None:
    """Sends every logger's lines to standard error. It raises ValueError for an unknown format or level."""
    form, level = typed("log_format", form, Format), typed("log_level", level, Level)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)  # Python's own warnings are lines of the same form
    sys.excepthook, threading.excepthook = _log_exception, _log_thread_exception
    sys.unraisablehook = _log_unraisable
    for noisy in ("jax", "uvicorn"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def _log_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    log.critical("the process ends", exc_info=(kind, error, trace))


def _log_thread_exception(hook: threading.ExceptHookArgs) -> None:
    name = hook.thread.name if hook.thread is not None else "unknown"
    error = hook.exc_value or hook.exc_type()
    log.critical("the thread %s ended", name, exc_info=(hook.exc_type, error, hook.exc_traceback))


def _log_unraisable(hook: Any) -> None:
    log.error("an exception that nobody could take", exc_info=hook.exc_value)


def printable(text: str) -> str:
    """Returns ``text`` with its control characters, line ends of every kind and marks of direction
    escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextLines(logging.Formatter):
    """Lines of the form ``time level message key=value ...``; the lines of a traceback are indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {key}={value}" for key, value in _fields(record).items())
        return printable(super().formatMessage(record) + pairs)

    def formatException(self, ei: Any) -> str:
        text = super().formatException(ei)
        return "\n".join("    " + printable(line) for line in text.splitlines())


class JsonLines(logging.Formatter):
    """Lines of the form ``{"time", "level", "logger", "message", ...}``, with "exception" if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # in ASCII: some readers end lines at U+2028 too


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Returns the fields that were logged with ``extra={"fields": {...}}``."""
    return getattr(record, "fields", {})
