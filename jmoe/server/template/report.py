"""The report of how a model chats: the form of its calls and of its thoughts, and why."""

from pathlib import Path
from typing import Any

from jmoe.server.dialects.detect import AUTO
from jmoe.server.template.chat_template import load_chat_template
from jmoe.server.template.probe import TOOL
from jmoe.server.template.tool_format import declared_format, tool_format


def chat_report(directory: Path, chat_template: str | None = None, setting: str = AUTO) -> dict[str, Any]:
    """Returns the report of a model directory. Raises ValueError for a template, or a tool format, that
    cannot be used.

    chat_template, setting: ``ServerSettings.chat_template`` and ``ServerSettings.tool_format``.
    """
    template = load_chat_template(directory, chat_template)
    found = tool_format(template, setting, declared_format(directory))
    has_tools = template is not None and template.chosen([TOOL]).forms.has_tools
    why = found.why if found.form is None or has_tools else f"{found.why}; the template does not show tools"
    return {
        "tool_format": None if found.form is None else found.form.name,
        "why": why,
        "thoughts": "none" if template is None else str(template.thinking),
    }
