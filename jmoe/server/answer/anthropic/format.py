"""The format of the Messages API: blocks of thoughts, text and calls."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import msgspec

from jmoe.engine.request import Output
from jmoe.server.answer.anthropic.replies import (
    Block,
    MessageDelta,
    MessageEvent,
    MessageReply,
    MessageUsage,
    StopReason,
    TextBlock,
    ThinkingBlock,
    ThinkingDetails,
    ToolUseBlock,
)
from jmoe.server.answer.formats import CountTokens, Outputs, StreamEvent, finish_reason
from jmoe.server.answer.replies import Head, Usage
from jmoe.server.answer.sections import Change, Closed, Grown, Kind, Opened, Section, Sections
from jmoe.server.errors import ApiError
from jmoe.server.request.tools import ToolUse

SIGNATURE = "am1vZQ=="  # clients only return it


class MessagesFormat:
    """An ``AnswerFormat`` of one choice.

    tools: how the answer uses tools.
    stops: the request's own stop strings; those of the model end its turn.
    """

    end = b""

    def __init__(self, tools: ToolUse | None, stops: Collection[str]):
        self.sections, self.stops = Sections(tools), stops
        self.last: Output | None = None

    def opening(self, head: Head, usage: CountTokens) -> Sequence[StreamEvent]:
        message = _message(head, [], None, None, usage())
        return [
            _event(MessageEvent(type="message_start", message=message)),
            _event(MessageEvent(type="ping")),
        ]

    def increment(self, head: Head, index: int, output: Output, usage: CountTokens) -> Sequence[StreamEvent]:
        self.last = output
        changes = self.sections.feed(output)
        return [_event(event) for change in changes for event in self._events(change)]

    def closing(self, head: Head, usage: CountTokens) -> Sequence[StreamEvent]:
        assert self.last is not None
        stop = self._stop(self.last)
        end = MessageDelta(stop_reason=stop[0], stop_sequence=stop[1])
        delta = MessageEvent(type="message_delta", delta=end, usage=_usage(usage()))
        return [_event(delta), _event(MessageEvent(type="message_stop"))]

    def failure(self, head: Head, error: ApiError, usage: CountTokens) -> Sequence[StreamEvent]:
        return [StreamEvent(error.anthropic(), "error")]

    def whole(self, head: Head, choices: Sequence[Outputs], usage: Usage) -> MessageReply:
        [outputs] = choices
        for output in outputs:
            for _ in self.sections.feed(output):
                pass
        blocks = [_block(section) for section in self.sections.all]
        return _message(head, blocks, *self._stop(outputs[-1]), usage)

    def _events(self, change: Change) -> Iterator[MessageEvent]:
        section = change.section
        index = self.sections.all.index(section)
        match change:
            case Opened():
                block = _block(Section(section.kind, section.name, section.id))
                if isinstance(block, ThinkingBlock):
                    block.signature = ""
                yield MessageEvent(type="content_block_start", index=index, content_block=block)
            case Grown():
                delta = _delta(section.kind, change.text)
                yield MessageEvent(type="content_block_delta", index=index, delta=delta)
            case Closed():
                if section.kind == "thoughts":
                    signed = MessageDelta(type="signature_delta", signature=SIGNATURE)
                    yield MessageEvent(type="content_block_delta", index=index, delta=signed)
                yield MessageEvent(type="content_block_stop", index=index)

    def _stop(self, last: Output) -> tuple[StopReason, str | None]:
        """Returns the reason for the end, and the request's stop string if that was it."""
        if finish_reason((last,)) == "length":
            return "max_tokens", None
        if self.sections.has_called:
            return "tool_use", None
        if isinstance(last.stop_reason, str) and last.stop_reason in self.stops:
            return "stop_sequence", last.stop_reason
        return "end_turn", None


def _event(event: MessageEvent) -> StreamEvent:
    return StreamEvent(event, event.type)


def _delta(kind: Kind, text: str) -> MessageDelta:
    if kind == "text":
        return MessageDelta(type="text_delta", text=text)
    if kind == "thoughts":
        return MessageDelta(type="thinking_delta", thinking=text)
    return MessageDelta(type="input_json_delta", partial_json=text)


def _block(section: Section) -> Block:
    if section.kind == "text":
        return TextBlock(section.text)
    if section.kind == "thoughts":
        return ThinkingBlock(section.text, SIGNATURE)
    return ToolUseBlock(section.id, section.name, _arguments(section))


def _arguments(section: Section) -> dict[str, Any]:
    """Returns a call's arguments; those of a call that was cut cannot be read."""
    try:
        return msgspec.json.decode(section.text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {}


def _usage(usage: Usage) -> MessageUsage:
    cached, details = usage.prompt_tokens_details.cached_tokens, usage.completion_tokens_details
    thoughts = 0 if isinstance(details, msgspec.UnsetType) else details.reasoning_tokens
    return MessageUsage(
        usage.prompt_tokens - cached, 0, cached, usage.completion_tokens, ThinkingDetails(thoughts)
    )


def _message(
    head: Head, content: list[Block], stop_reason: StopReason | None, stop_sequence: str | None, usage: Usage
) -> MessageReply:
    return MessageReply(
        id=head.id,
        type="message",
        role="assistant",
        model=head.model,
        content=content,
        stop_reason=stop_reason,
        stop_sequence=stop_sequence,
        usage=_usage(usage),
    )
