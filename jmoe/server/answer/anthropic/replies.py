"""The structs of the Messages API's answers; see ``answer.replies``."""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from jmoe.server.request.schema import Count, Strict

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
EventName = Literal[
    "message_start", "ping", "content_block_start", "content_block_delta", "content_block_stop",
    "message_delta", "message_stop",
]  # fmt: skip


class TextBlock(Strict, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(Strict, tag_field="type", tag="thinking"):
    """signature: a fixed text: the server reads the thoughts themselves."""

    thinking: str
    signature: str


class ToolUseBlock(Strict, tag_field="type", tag="tool_use"):
    """input: arguments; empty if the answer was cut in them."""

    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock


class ThinkingDetails(Strict):
    """thinking_tokens: number of the answer's tokens that are thoughts."""

    thinking_tokens: Count


class MessageUsage(Strict):
    """The tokens of a request.

    input_tokens: prompt tokens that were not in the prefix cache.
    cache_creation_input_tokens: always 0: what is new in the cache costs nothing more.
    cache_read_input_tokens: prompt tokens that were in the prefix cache.
    output_tokens: number of tokens of the answer.
    output_tokens_details: tokens of thoughts.
    """

    input_tokens: Count
    cache_creation_input_tokens: Count
    cache_read_input_tokens: Count
    output_tokens: Count
    output_tokens_details: ThinkingDetails


class MessageReply(Strict, kw_only=True):
    """The answer of /v1/messages.

    id: id of the message.
    type: type of the answer.
    role: role of the message.
    model: served model name.
    content: blocks of thoughts, text and calls; empty where a stream begins.
    stop_reason: reason for the end; null where a stream begins.
    stop_sequence: the request's text that ended the answer, if one did.
    usage: token counts.
    """

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageDelta(Strict, kw_only=True):
    """A piece of a block, whose field is named by the type, or the reason for the end."""

    type: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: StopReason | UnsetType = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class MessageEvent(Struct, kw_only=True, forbid_unknown_fields=True):
    """An event of a streamed message.

    type: name of the event.
    message: message without content, where the stream begins.
    index: number of the block.
    content_block: empty block that begins.
    delta: piece of the block, or the reason for the end.
    usage: token counts at the end.
    """

    type: EventName
    message: MessageReply | UnsetType = UNSET
    index: Count | UnsetType = UNSET
    content_block: Block | UnsetType = UNSET
    delta: MessageDelta | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET


class TokenCount(Strict):
    """input_tokens: number of tokens of the prompt."""

    input_tokens: Count
