"""The items of a response: each is made of one section, and tells of its growth in events."""

import uuid
from collections.abc import Iterator, Mapping
from typing import Protocol

from msgspec import UNSET, UnsetType

from jmoe.server.answer.responses.custom_input import InputReader
from jmoe.server.answer.responses.replies import (
    CustomCallItem,
    FunctionCallItem,
    Item,
    ItemStatus,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseEvent,
    SummaryText,
)
from jmoe.server.answer.sections import Section
from jmoe.server.request.apis.responses.tools import ToolName


class ItemWriter(Protocol):
    """Writes one item. The events have no numbers yet, and lack those of the item's beginning and end.

    item: returns the item with its text so far, or empty if it begins.
    opened, grown, closed: return the events of its beginning, of more text and of its end.
    """

    def item(self, status: ItemStatus) -> Item: ...
    def opened(self) -> Iterator[ResponseEvent]: ...
    def grown(self, text: str) -> Iterator[ResponseEvent]: ...
    def closed(self) -> Iterator[ResponseEvent]: ...


def item_writer(
    section: Section, index: int, names: Mapping[str, ToolName], *, has_summary: bool
) -> ItemWriter:
    """Returns the writer of a section that begins.

    index: number of the item.
    names: names that the client knows, by function.
    has_summary: whether thoughts are also written as a summary.
    """
    if section.kind == "text":
        return TextWriter(section, index)
    if section.kind == "thoughts":
        return ThoughtsWriter(section, index, has_summary=has_summary)
    name = names.get(section.name, ToolName(section.name))
    return CustomWriter(section, index, name) if name.is_custom else CallWriter(section, index, name)


class _Place:
    """The place of an item in the answer.

    id: id of the item.
    """

    prefix = ""

    def __init__(self, section: Section, index: int):
        self.section, self.index = section, index
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"

    def _event(self, type: str, **fields) -> ResponseEvent:
        return ResponseEvent(
            type=f"response.{type}", sequence_number=0, output_index=self.index, item_id=self.id, **fields
        )


class TextWriter(_Place):
    prefix = "msg"

    def item(self, status: ItemStatus) -> Item:
        content = [] if status == "in_progress" else [OutputText(self.section.text)]
        return MessageItem(id=self.id, status=status, content=content)

    def opened(self) -> Iterator[ResponseEvent]:
        yield self._event("content_part.added", content_index=0, part=OutputText(""))

    def grown(self, text: str) -> Iterator[ResponseEvent]:
        yield self._event("output_text.delta", content_index=0, delta=text, logprobs=[])

    def closed(self) -> Iterator[ResponseEvent]:
        text = self.section.text
        yield self._event("output_text.done", content_index=0, text=text, logprobs=[])
        yield self._event("content_part.done", content_index=0, part=OutputText(text))


class ThoughtsWriter(_Place):
    prefix = "rs"

    def __init__(self, section: Section, index: int, *, has_summary: bool):
        super().__init__(section, index)
        self.has_summary = has_summary

    def item(self, status: ItemStatus) -> Item:
        text, is_empty = self.section.text, status == "in_progress"
        content = [] if is_empty else [ReasoningText(text)]
        summary = [SummaryText(text)] if self.has_summary and not is_empty else []
        return ReasoningItem(id=self.id, status=status, summary=summary, content=content)

    def opened(self) -> Iterator[ResponseEvent]:
        yield self._event("content_part.added", content_index=0, part=ReasoningText(""))
        if self.has_summary:
            yield self._event("reasoning_summary_part.added", summary_index=0, part=SummaryText(""))

    def grown(self, text: str) -> Iterator[ResponseEvent]:
        yield self._event("reasoning_text.delta", content_index=0, delta=text)
        if self.has_summary:
            yield self._event("reasoning_summary_text.delta", summary_index=0, delta=text)

    def closed(self) -> Iterator[ResponseEvent]:
        text = self.section.text
        yield self._event("reasoning_text.done", content_index=0, text=text)
        yield self._event("content_part.done", content_index=0, part=ReasoningText(text))
        if self.has_summary:
            yield self._event("reasoning_summary_text.done", summary_index=0, text=text)
            yield self._event("reasoning_summary_part.done", summary_index=0, part=SummaryText(text))


class _CallPlace(_Place):
    """The place of a call. Its item has no part that begins.

    name: name that the client knows.
    """

    def __init__(self, section: Section, index: int, name: ToolName):
        super().__init__(section, index)
        self.name = name

    @property
    def namespace(self) -> str | UnsetType:
        return UNSET if self.name.namespace is None else self.name.namespace

    def opened(self) -> Iterator[ResponseEvent]:
        yield from ()


class CallWriter(_CallPlace):
    prefix = "fc"

    def item(self, status: ItemStatus) -> Item:
        return FunctionCallItem(
            id=self.id,
            status=status,
            call_id=self.section.id,
            name=self.name.name,
            namespace=self.namespace,
            arguments="" if status == "in_progress" else self.section.text,
        )

    def grown(self, text: str) -> Iterator[ResponseEvent]:
        yield self._event("function_call_arguments.delta", delta=text)

    def closed(self) -> Iterator[ResponseEvent]:
        yield self._event("function_call_arguments.done", name=self.name.name, arguments=self.section.text)


class CustomWriter(_CallPlace):
    prefix = "ctc"

    def __init__(self, section: Section, index: int, name: ToolName):
        super().__init__(section, index, name)
        self.reader = InputReader()
        self.pieces: list[str] = []

    def item(self, status: ItemStatus) -> Item:
        return CustomCallItem(
            id=self.id,
            status=status,
            call_id=self.section.id,
            name=self.name.name,
            namespace=self.namespace,
            input="" if status == "in_progress" else "".join(self.pieces),
        )

    def grown(self, text: str) -> Iterator[ResponseEvent]:
        piece = self.reader.feed(text)
        self.pieces.append(piece)
        if piece:
            yield self._event("custom_tool_call_input.delta", delta=piece)

    def closed(self) -> Iterator[ResponseEvent]:
        yield self._event("custom_tool_call_input.done", input="".join(self.pieces))
