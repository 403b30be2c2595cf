"""The messages and tools of a conversation as typed structs, and the choices of a chat."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from jmoe.server.request.fields.base import Absent, Count, Name, Strict, WithSource, only


class CalledFunction(Strict, kw_only=True):
    """arguments: JSON text of an object, or the object; the text of a cut answer may end anywhere."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(Strict, kw_only=True):
    """index, extra_content: fields of a stream's deltas; they change nothing here."""

    id: str
    function: CalledFunction
    type: Literal["function"] | None = None
    index: int | None = None
    extra_content: Any = None


class Message(WithSource, kw_only=True):
    """content: text, or a list of parts.
    tool_call_id: id of the call that a tool answers.
    reasoning_content, reasoning, thinking: thoughts of an assistant before its answer.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Annotated[Any, only("none")] = None
    audio: Absent = None
    annotations: Annotated[Any, only([])] = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None


class Function(Strict, kw_only=True):
    """parameters: JSON schema of an object; null if the function has no arguments.
    strict: whether a schema that cannot be followed exactly is refused.
    """

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(WithSource, kw_only=True):
    type: Literal["function"]
    function: Function


class FunctionName(Strict, kw_only=True):
    name: str


class NamedTool(Strict, tag_field="type", tag="function"):
    function: FunctionName


class AllowedToolsChoice(Strict, kw_only=True):
    """mode: whether the answer may, or must, call one of the tools.
    tools: the tools that it may call; the model sees the others too.
    """

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=128)]


class AllowedTools(Strict, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedToolsChoice


class ThinkingSwitch(Strict, kw_only=True):
    """type: whether the model thinks; "adaptive" leaves it to the model.
    budget_tokens: accepted, without effect.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: str | None = None
    clear_thinking: bool | None = None
