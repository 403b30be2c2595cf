"""A body of the Responses API as a chat request."""

from dataclasses import dataclass
from typing import Any

from jmoe.server.errors import invalid
from jmoe.server.request.apis.conversion import chat_request, thinking_fields
from jmoe.server.request.apis.notices import Notices
from jmoe.server.request.apis.responses.fields import FlatFormat, InputRequest, ResponsesRequest
from jmoe.server.request.apis.responses.items import Conversation
from jmoe.server.request.apis.responses.tools import FlatTools, flat_tools
from jmoe.server.request.checks import check_supported
from jmoe.server.request.schema import ChatRequest

# The names of the chat's fields in errors of this API.
NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}


@dataclass(frozen=True)
class ResponsesChat:
    """A body as a chat request, and the tools by which its answer is written."""

    chat: ChatRequest
    tools: FlatTools


def responses_chat(body: InputRequest, items: list[dict[str, Any]], notices: Notices) -> ResponsesChat:
    """Returns the body as a chat request.

    items: the conversation, with the items before the body's own and without references.
    """
    check_supported(body)
    if not items:
        raise invalid("input must not be empty", "input")
    messages = [] if not body.instructions else [{"role": "system", "content": body.instructions}]
    tools = flat_tools(body.tools or [], notices)
    chosen = tools.choice(body.tool_choice)
    form = None if body.text is None else body.text.format
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages + _messages(items, len(items) - _own(body)),
        "tools": chosen.functions or None,
        "tool_choice": chosen.choice,
        "parallel_tool_calls": body.parallel_tool_calls if chosen.functions else None,
        "response_format": None if form is None else _format(form),
        **thinking_fields(None if body.reasoning is None else body.reasoning.effort, None),
    }
    if isinstance(body, ResponsesRequest):
        fields |= {
            "max_completion_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "stream": body.stream,
        }
    return ResponsesChat(chat_request(fields), tools)


def _own(body: InputRequest) -> int:
    """Returns the number of the body's own items."""
    return len(body.input) if isinstance(body.input, list) else int(body.input is not None)


def _messages(items: list[dict[str, Any]], num_earlier: int) -> list[dict[str, Any]]:
    conversation = Conversation()
    for i, item in enumerate(items):
        conversation.add(item, f"input[{i - num_earlier}]")
    return conversation.messages


def _format(form: FlatFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type or "text"}
    if form.name is None or form.schema is None:
        field = "name" if form.name is None else "schema"
        raise invalid(
            f"text.format.{field} is required", f"text.format.{field}", "missing_required_parameter"
        )
    given = {"name": form.name, "schema": form.schema, "strict": form.strict, "description": form.description}
    return {"type": "json_schema", "json_schema": {k: v for k, v in given.items() if v is not None}}
