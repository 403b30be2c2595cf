"""The structs of the Responses API's answers; see ``answer.replies``."""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType, field

from jmoe.server.request.schema import Count, Strict

Status = Literal["in_progress", "completed", "incomplete", "failed"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Strict, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)


class ReasoningText(Strict, tag_field="type", tag="reasoning_text"):
    text: str


class SummaryText(Strict, tag_field="type", tag="summary_text"):
    text: str


Part = OutputText | ReasoningText | SummaryText


class MessageItem(Strict, tag_field="type", tag="message", kw_only=True):
    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningItem(Strict, tag_field="type", tag="reasoning", kw_only=True):
    """summary: the thoughts again, if the request wants a summary."""

    id: str
    status: ItemStatus
    summary: list[SummaryText]
    content: list[ReasoningText]
    encrypted_content: None = None


class FunctionCallItem(Strict, tag_field="type", tag="function_call", kw_only=True):
    """call_id: id that the result of the call names.
    namespace: namespace of the function; absent if it is in none.
    arguments: JSON text of an object; cut if the answer was cut.
    """

    id: str
    status: ItemStatus
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    arguments: str


class CustomCallItem(Strict, tag_field="type", tag="custom_tool_call", kw_only=True):
    """input: text of the call."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    input: str


Item = MessageItem | ReasoningItem | FunctionCallItem | CustomCallItem


class CachedTokens(Strict):
    cached_tokens: Count


class ReasoningTokens(Strict):
    reasoning_tokens: Count


class ResponseUsage(Strict):
    """The tokens of a request.

    input_tokens: number of prompt tokens.
    input_tokens_details: those that were in the prefix cache.
    output_tokens: number of tokens of the answer.
    output_tokens_details: those that are thoughts.
    total_tokens: sum of prompt and answer.
    """

    input_tokens: Count
    input_tokens_details: CachedTokens
    output_tokens: Count
    output_tokens_details: ReasoningTokens
    total_tokens: Count


class ResponseError(Strict):
    code: str
    message: str


class IncompleteDetails(Strict):
    reason: Literal["max_output_tokens"]


class ReasoningOptions(Strict):
    effort: str | None
    summary: str | None


class ResponseReply(Strict, kw_only=True):
    """The answer of /v1/responses. Fields that only repeat the request are written as OpenAI's.

    id: id of the answer, for ``previous_response_id``.
    object: type of the answer.
    created_at: time of the request, in seconds since 1970.
    status: incomplete if the answer was cut.
    error: cause of the status "failed".
    incomplete_details: cause of the status "incomplete".
    model: served model name.
    output: items of thoughts, text and calls.
    store: whether later requests may refer to the answer.
    usage: token counts; null until the end.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningOptions
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str]


class ResponseEvent(Struct, kw_only=True, forbid_unknown_fields=True):
    """An event of a streamed response. It has the fields of its type.

    type: name of the event.
    sequence_number: number of the event.
    response: answer so far, in the first two events and the last one.
    output_index: number of the item.
    item: item that begins or ends.
    item_id: id of the item.
    content_index, summary_index: number of the part.
    part: part that begins or ends.
    delta: more text of the part, the arguments or the input.
    text, arguments, input: the whole of it.
    name: name of the function whose arguments are whole.
    logprobs: always empty.
    """

    type: str
    sequence_number: Count
    response: ResponseReply | UnsetType = UNSET
    output_index: Count | UnsetType = UNSET
    item: Item | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: Count | UnsetType = UNSET
    summary_index: Count | UnsetType = UNSET
    part: Part | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    input: str | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET


class Deleted(Strict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputTokens(Strict):
    """input_tokens: number of tokens of the prompt."""

    object: Literal["response.input_tokens"]
    input_tokens: Count
