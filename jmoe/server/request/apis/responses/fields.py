"""The fields of a body of the Responses API."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from jmoe.server.request.apis.conversion import Open
from jmoe.server.request.bounds import MAX_MESSAGES
from jmoe.server.request.schema import Absent, Name, Off, Positive

MAX_TOOLS = 512  # of all types, including those that are left out
Items = Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)]


class Reasoning(Open, kw_only=True):
    """The amount of the model's thoughts.

    effort: word that the model's template gets, such as "low".
    summary, generate_summary: any value but null: the thoughts are also written as a summary.
    """

    effort: Annotated[str, Meta(max_length=32)] | None = None
    summary: str | None = None
    generate_summary: str | None = None


class FlatFormat(Open, kw_only=True):
    """The form of the answer's text.

    name, schema, strict, description: of a json_schema only; it is always followed exactly.
    """

    type: Literal["text", "json_object", "json_schema"] | None = None
    name: Name | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(Open, kw_only=True):
    """verbosity: accepted; it changes nothing."""

    format: FlatFormat | None = None
    verbosity: str | None = None


class InputRequest(Open, kw_only=True):
    """The fields that the prompt is made from.

    input: text of the user, or items.
    instructions: system message before the input.
    previous_response_id: answer whose input and output come before the input.
    tools: functions, custom tools and namespaces of them; others are left out.
    """

    model: str | None = None
    input: str | Items | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Meta(max_length=128)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    # Accepted and without effect.
    truncation: str | None = None
    # Neutral values only.
    conversation: Absent = None


class ResponsesRequest(InputRequest, kw_only=True):
    """A body of /v1/responses.

    max_output_tokens: longest answer; one that does not fit in the context asks for the rest of it.
    store: whether later requests may refer to the answer; true if absent.
    metadata: texts that the answer repeats.
    """

    max_output_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stream: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    # Accepted and without effect: they concern accounts, billing, other servers' caches and hosted tools.
    include: list[str] | None = None
    stream_options: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None
    # Neutral values only.
    background: Off = None
    prompt: Absent = None
