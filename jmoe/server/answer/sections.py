"""The sections of one answer, in their order: thoughts, text and calls.

The APIs whose answers are lists (of items, of blocks) are written from them, in any dialect.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from jmoe.engine.request import Output
from jmoe.server.answer.calls import call_id
from jmoe.server.dialects.events import Arguments, CallEnd, CallStart, PlainText
from jmoe.server.request.tools import ToolUse

Kind = Literal["thoughts", "text", "call"]


@dataclass(eq=False)
class Section:
    """One section, which grows until it is closed.

    pieces: its text so far; of a call, the JSON text of the arguments.
    name, id: of a call only.
    is_whole: whether nothing of a call's arguments is missing.
    """

    kind: Kind
    name: str = ""
    id: str = ""
    pieces: list[str] = field(default_factory=list)
    is_whole: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class Opened:
    section: Section


@dataclass(frozen=True)
class Grown:
    """More text of a section."""

    section: Section
    text: str


@dataclass(frozen=True)
class Closed:
    section: Section


Change = Opened | Grown | Closed


class Sections:
    """Divides the increments of one answer.

    White space alone is no section, unless it is the whole answer: models write line ends between their
    thoughts, text and calls. It belongs to the text that follows it.

    tools: how the answer uses tools; None if it has no calls.
    all: sections that have begun.
    has_called: whether there is a call and the arguments of the last one are whole.
    """

    def __init__(self, tools: ToolUse | None):
        self.tools, self.reader = tools, None if tools is None else tools.reader()
        self.all: list[Section] = []
        self.open: Section | None = None
        self.space = ""  # white space that may begin a section of the same kind as ``space_kind``
        self.space_kind: Kind = "text"

    @property
    def has_called(self) -> bool:
        calls = [section for section in self.all if section.kind == "call"]
        return bool(calls) and calls[-1].is_whole

    def feed(self, output: Output) -> Iterator[Change]:
        """Yields what an increment changes; the last increment closes the last section."""
        if output.thoughts:
            yield from self._write("thoughts", output.thoughts)
        is_last = output.finish_reason is not None
        if self.reader is None:
            events = [PlainText(output.text)]
        else:
            events = [*self.reader.feed(output.text), *(self.reader.close() if is_last else ())]
        for event in events:
            match event:
                case PlainText():
                    yield from self._write("text", event.text)
                case CallStart():
                    self.space = ""
                    yield from self._begin(Section("call", event.name, self._call_id(event)))
                case Arguments():
                    yield from self._grow(event.text)
                case CallEnd():
                    if self.open is not None:
                        self.open.is_whole = True
                    yield from self._close()
        if is_last and not self.all and self.space:
            yield from self._begin(Section(self.space_kind))
            yield from self._grow(self.space)
        if is_last:
            yield from self._close()

    def _call_id(self, start: CallStart) -> str:
        assert self.tools is not None  # the reader is theirs
        return call_id(self.tools, start, sum(section.kind == "call" for section in self.all))

    def _write(self, kind: Kind, text: str) -> Iterator[Change]:
        if self.open is None or self.open.kind != kind:
            self.space, self.space_kind = (self.space if self.space_kind == kind else "") + text, kind
            if not self.space.strip():
                return
            text, self.space = self.space, ""
            yield from self._begin(Section(kind))
        yield from self._grow(text)

    def _begin(self, section: Section) -> Iterator[Change]:
        yield from self._close()
        self.open = section
        self.all.append(section)
        yield Opened(section)

    def _grow(self, text: str) -> Iterator[Change]:
        if self.open is not None and text:
            self.open.pieces.append(text)
            yield Grown(self.open, text)

    def _close(self) -> Iterator[Change]:
        if self.open is not None:
            section, self.open = self.open, None
            yield Closed(section)
