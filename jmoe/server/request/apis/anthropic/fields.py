"""The fields of a body of the Messages API."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from jmoe.server.request.apis.conversion import Open
from jmoe.server.request.bounds import MAX_MESSAGES
from jmoe.server.request.schema import Positive, StopTexts

MAX_TOOLS = 512  # of all types, including those that are left out
Blocks = list[dict[str, Any]]


class InputMessage(Open, kw_only=True):
    """content: text, or blocks: text, thoughts, calls of tools and their results."""

    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class Thinking(Open, kw_only=True):
    """type: whether the model thinks, where its template has such a switch; a budget has no effect."""

    type: Literal["enabled", "disabled", "adaptive"]


class SchemaFormat(Open, kw_only=True):
    """The form of the answer's text: JSON that is valid by the schema."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Open, kw_only=True):
    """effort: word that the model's template gets, such as "low".
    format: form of the answer's text.
    """

    effort: Annotated[str, Meta(max_length=32)] | None = None
    format: SchemaFormat | None = None


class ToolChoice(Open, kw_only=True):
    """name: tool that is called; of the type "tool" only.
    disable_parallel_tool_use: whether the answer has at most one call.
    """

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountRequest(Open, kw_only=True):
    """A body of /v1/messages/count_tokens: the fields that the prompt is made from.

    system: system message before the messages.
    tools: tools with an input_schema; tools that Anthropic's servers run are left out.
    """

    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    system: str | Blocks | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: SchemaFormat | None = None
    # Accepted and without effect.
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """A body of /v1/messages.

    max_tokens: longest answer; one that does not fit in the context asks for the rest of it, as does null.
    stop_sequences: texts that end the answer and are cut from it.
    """

    max_tokens: Positive | None = None
    stop_sequences: StopTexts | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    # Accepted and without effect: they concern accounts, billing and Anthropic's own tools.
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    container: Any = None
    inference_geo: str | None = None
