"""A body of the Messages API as a chat request."""

from typing import Any

from jmoe.server.errors import invalid
from jmoe.server.request.apis.anthropic.blocks import chat_messages, system_messages
from jmoe.server.request.apis.anthropic.fields import CountRequest, MessagesRequest, SchemaFormat, ToolChoice
from jmoe.server.request.apis.conversion import (
    Open,
    chat_request,
    function_tool,
    named_function,
    thinking_fields,
)
from jmoe.server.request.apis.notices import Notices
from jmoe.server.request.decoding import converted
from jmoe.server.request.schema import ChatRequest

# The names of the chat's fields in errors of this API.
NAMES = {
    "response_format": "output_config.format",
    "max_completion_tokens": "max_tokens",
    "reasoning_effort": "output_config.effort",
    "enable_thinking": "thinking",
    "stop": "stop_sequences",
    "continue_final_message": "messages",
}


class ClientTool(Open, kw_only=True):
    """A tool that the client runs."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


def messages_chat(body: CountRequest, notices: Notices) -> ChatRequest:
    """Returns the body as a chat request."""
    messages = system_messages(body.system)
    for i, message in enumerate(body.messages):
        messages += chat_messages(message, f"messages[{i}]")
    tools = _functions(body.tools or [], body.tool_choice, notices)
    form = body.output_format if body.output_config is None else body.output_config.format
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "tools": tools or None,
        "tool_choice": _choice(body.tool_choice, bool(tools)),
        "response_format": None if form is None else _format(form),
        **thinking_fields(
            None if body.output_config is None else body.output_config.effort,
            None if body.thinking is None else body.thinking.type != "disabled",
        ),
    }
    if tools and body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    if messages[-1]["role"] == "assistant":  # the answer continues it
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_completion_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "stream": body.stream,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
        }
    return chat_request(fields)


def _functions(
    tools: list[dict[str, Any]], choice: ToolChoice | None, notices: Notices
) -> list[dict[str, Any]]:
    """Returns the functions of a chat. A tool without an input schema runs on Anthropic's servers and is left
    out, unless the request demands its use."""
    made = []
    for i, tool in enumerate(tools):
        kind = tool.get("type") or "custom"
        if kind == "custom" or "input_schema" in tool:
            own = converted(tool, ClientTool, f"tools[{i}]")
            made.append(function_tool(own.name, own.description, own.input_schema, own.strict))
            continue
        if choice is not None and choice.type == "tool" and choice.name == tool.get("name"):
            message = f"tool_choice names {str(choice.name)[:64]!r}, a tool that this server does not run"
            raise invalid(message, "tool_choice")
        notices.tell_once(
            f"/v1/messages: tools of type {str(kind)[:64]!r} are not known here and are left out"
        )
    return made


def _choice(choice: ToolChoice | None, has_tools: bool) -> Any:
    if choice is None or (choice.type in ("auto", "none") and not has_tools):
        return None
    if choice.type == "tool":
        if choice.name is None:
            message = "tool_choice.name is required"
            raise invalid(message, "tool_choice.name", "missing_required_parameter")
        return named_function(choice.name)
    return "required" if choice.type == "any" else choice.type


def _format(form: SchemaFormat) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.schema, "strict": True}}
