"""The dialects in which models write calls of functions: each has one short file, and one entry here.

A request's ``ToolUse`` carries its dialect: the first one here that serves its ``tool_choice``. The formats
of answers read the events that its reader finds, and know no dialect.
"""

from jmoe.server.request.dialects import json_call
from jmoe.server.request.dialects.dialect import (
    Arguments,
    CallEnd,
    CallStart,
    Choice,
    Dialect,
    Event,
    PlainText,
    Reader,
)

DIALECTS = {dialect.name: dialect for dialect in (json_call.DIALECT,)}

__all__ = [
    "DIALECTS",
    "Arguments",
    "CallEnd",
    "CallStart",
    "Choice",
    "Dialect",
    "Event",
    "PlainText",
    "Reader",
]
