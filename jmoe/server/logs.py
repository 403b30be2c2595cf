"""How log lines look: text, or one JSON object a line. No client's text begins a line of its own."""

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

from jmoe.reading import typed

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]


def configure(form: str, level: str) -> None:
    """Sends every logger's lines to standard error. Raises ValueError for a format or level that is none."""
    form, level = typed("log_format", form, Format), typed("log_level", level, Level)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("jax", "uvicorn"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


def printable(text: str) -> str:
    """``text`` with its control characters, line ends of every kind and marks of direction escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextLines(logging.Formatter):
    """``time level message key=value ...``; the lines of a traceback are indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        pairs = "".join(f" {key}={value}" for key, value in _fields(record).items())
        return printable(super().formatMessage(record) + pairs)

    def formatException(self, ei: Any) -> str:
        text = super().formatException(ei)
        return "\n".join("    " + printable(line) for line in text.splitlines())


class JsonLines(logging.Formatter):
    """``{"time", "level", "logger", "message", ...}``, and "exception" where there is one."""

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
    """What was logged with ``extra={"fields": {...}}``."""
    return getattr(record, "fields", {})
