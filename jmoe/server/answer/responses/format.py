"""The format of the Responses API: items of thoughts, text and calls."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from jmoe.engine.request import Output
from jmoe.server.answer.formats import CountTokens, Outputs, StreamEvent
from jmoe.server.answer.replies import Head, Usage
from jmoe.server.answer.responses.items import ItemWriter, item_writer
from jmoe.server.answer.responses.replies import (
    CachedTokens,
    IncompleteDetails,
    Item,
    ItemStatus,
    ReasoningOptions,
    ReasoningTokens,
    ResponseError,
    ResponseEvent,
    ResponseReply,
    ResponseUsage,
    Status,
)
from jmoe.server.answer.sections import Change, Closed, Grown, Opened, Section, Sections
from jmoe.server.errors import ApiError
from jmoe.server.request.apis.responses.fields import ResponsesRequest
from jmoe.server.request.apis.responses.tools import ToolName
from jmoe.server.request.tools import ToolUse


class ResponsesFormat:
    """An ``AnswerFormat`` of one choice.

    body: request, which the answer repeats in part.
    tools: how the answer uses tools.
    names: names that the client knows, by function.
    keep: function that stores the whole answer; None = it is not stored.
    """

    end = b""

    def __init__(
        self,
        body: ResponsesRequest,
        tools: ToolUse | None,
        names: Mapping[str, ToolName],
        keep: Callable[[ResponseReply], None] | None,
    ):
        self.body, self.names, self.keep = body, names, keep
        reasoning = body.reasoning
        self.summary = None if reasoning is None else reasoning.summary or reasoning.generate_summary
        self.sections = Sections(tools)
        self.writers: dict[Section, ItemWriter] = {}
        self.items: list[Item] = []  # those that have ended
        self.is_cut = False
        self.numbers = itertools.count()

    def opening(self, head: Head, usage: CountTokens) -> Sequence[StreamEvent]:
        names = ("response.created", "response.in_progress")
        reply = self._reply(head, "in_progress", None)
        return [self._numbered(ResponseEvent(type=n, sequence_number=0, response=reply)) for n in names]

    def increment(self, head: Head, index: int, output: Output, usage: CountTokens) -> Sequence[StreamEvent]:
        return [self._numbered(event) for event in self._events(output)]

    def closing(self, head: Head, usage: CountTokens) -> Sequence[StreamEvent]:
        return [self._last(self._end(head, usage()))]

    def failure(self, head: Head, error: ApiError, usage: CountTokens) -> Sequence[StreamEvent]:
        reply = self._reply(head, "failed", usage())
        reply.error = ResponseError(error.code or "server_error", error.message)
        return [self._last(reply)]

    def whole(self, head: Head, choices: Sequence[Outputs], usage: Usage) -> ResponseReply:
        [outputs] = choices
        for output in outputs:
            for _ in self._events(output):
                pass
        return self._end(head, usage)

    def _events(self, output: Output) -> Iterator[ResponseEvent]:
        changes: list[Change] = [*self.sections.feed(output)]
        if output.finish_reason is not None and not self.sections.all:
            empty = Section("text")  # clients look for a message
            changes = [Opened(empty), Closed(empty)]
        self.is_cut = output.finish_reason == "length"
        for change in changes:
            yield from self._changed(change, is_last=change is changes[-1])

    def _changed(self, change: Change, *, is_last: bool) -> Iterator[ResponseEvent]:
        section = change.section
        match change:
            case Opened():
                index, has_summary = len(self.writers), self.summary is not None
                writer = item_writer(section, index, self.names, has_summary=has_summary)
                self.writers[section] = writer
                yield _item_event("added", index, writer.item("in_progress"))
                yield from writer.opened()
            case Grown():
                yield from self.writers[section].grown(change.text)
            case Closed():
                writer = self.writers[section]
                yield from writer.closed()
                is_cut = self.is_cut and is_last and not section.is_whole
                status: ItemStatus = "incomplete" if is_cut else "completed"
                yield _item_event("done", len(self.items), writer.item(status))
                self.items.append(writer.item(status))

    def _end(self, head: Head, usage: Usage) -> ResponseReply:
        reply = self._reply(head, "incomplete" if self.is_cut else "completed", usage)
        if self.is_cut:
            reply.incomplete_details = IncompleteDetails("max_output_tokens")
        if self.keep is not None:
            self.keep(reply)
        return reply

    def _last(self, reply: ResponseReply) -> StreamEvent:
        event = ResponseEvent(type=f"response.{reply.status}", sequence_number=0, response=reply)
        return self._numbered(event)

    def _numbered(self, event: ResponseEvent) -> StreamEvent:
        event.sequence_number = next(self.numbers)
        return StreamEvent(event, event.type)

    def _reply(self, head: Head, status: Status, usage: Usage | None) -> ResponseReply:
        body = self.body
        return ResponseReply(
            id=head.id,
            created_at=head.created,
            status=status,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=head.model,
            output=self.items,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning=ReasoningOptions(
                None if body.reasoning is None else body.reasoning.effort, self.summary
            ),
            store=self.keep is not None,
            temperature=1.0 if body.temperature is None else body.temperature,
            text=_text(body),
            tool_choice="auto" if body.tool_choice is None else body.tool_choice,
            tools=body.tools or [],
            top_p=1.0 if body.top_p is None else body.top_p,
            usage=None if usage is None else _usage(usage),
            metadata=body.metadata or {},
        )


def _item_event(what: str, index: int, item: Item) -> ResponseEvent:
    return ResponseEvent(
        type=f"response.output_item.{what}", sequence_number=0, output_index=index, item=item
    )


def _text(body: ResponsesRequest) -> dict[str, Any]:
    form = None if body.text is None else body.text.format
    fields = {} if form is None else msgspec.to_builtins(form)
    given = {name: value for name, value in fields.items() if value is not None}
    return {"format": {"type": "text"} | given}


def _usage(usage: Usage) -> ResponseUsage:
    details = usage.completion_tokens_details
    thoughts = 0 if isinstance(details, msgspec.UnsetType) else details.reasoning_tokens
    return ResponseUsage(
        usage.prompt_tokens,
        CachedTokens(usage.prompt_tokens_details.cached_tokens),
        usage.completion_tokens,
        ReasoningTokens(thoughts),
        usage.total_tokens,
    )
