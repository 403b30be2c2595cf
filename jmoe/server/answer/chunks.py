"""The stream of completions and of chat completions: chunks without names, and ``[DONE]`` last."""

from collections.abc import Sequence
from typing import Protocol

from jmoe.engine.request import Output
from jmoe.server.answer.formats import CountTokens, Outputs, StreamEvent
from jmoe.server.answer.replies import ChatCompletion, ChatCompletionChunk, Completion, Head, Usage
from jmoe.server.errors import ApiError
from jmoe.server.request.schema import StreamOptions

Chunk = Completion | ChatCompletionChunk
Whole = Completion | ChatCompletion


class ChunkFormat(Protocol):
    """The way in which the choices of an answer are written.

    opening: returns the chunks to stream before any token.
    chunk: returns a stream's chunk with one increment of choice ``index``.
    closing: returns the chunk without choices that may end a stream.
    whole: returns the answer made of all increments of each choice.
    """

    def opening(self, head: Head) -> Sequence[Chunk]: ...
    def chunk(self, head: Head, index: int, output: Output) -> Chunk: ...
    def closing(self, head: Head) -> Chunk: ...
    def whole(self, head: Head, choices: Sequence[Outputs], usage: Usage) -> Whole: ...


class Chunks:
    """An ``AnswerFormat`` that streams chunks.

    form: the way in which the choices are written.
    options: options of the stream. If usage was requested, it is null in a chunk that does not count it.
    """

    end = b"data: [DONE]\n\n"

    def __init__(self, form: ChunkFormat, options: StreamOptions | None):
        self.form = form
        self.with_usage = bool(options and options.include_usage)
        self.in_each = bool(self.with_usage and options and options.continuous_usage_stats)

    def opening(self, head: Head, usage: CountTokens) -> Sequence[StreamEvent]:
        return [self._event(chunk, usage) for chunk in self.form.opening(head)]

    def increment(self, head: Head, index: int, output: Output, usage: CountTokens) -> Sequence[StreamEvent]:
        return [self._event(self.form.chunk(head, index, output), usage)]

    def closing(self, head: Head, usage: CountTokens) -> Sequence[StreamEvent]:
        if not self.with_usage:
            return ()
        chunk = self.form.closing(head)
        chunk.usage = usage()
        return [StreamEvent(chunk)]

    def failure(self, head: Head, error: ApiError, usage: CountTokens) -> Sequence[StreamEvent]:
        return [StreamEvent(error.envelope())]

    def whole(self, head: Head, choices: Sequence[Outputs], usage: Usage) -> Whole:
        return self.form.whole(head, choices, usage)

    def _event(self, chunk: Chunk, usage: CountTokens) -> StreamEvent:
        if self.with_usage:
            chunk.usage = usage() if self.in_each else None
        return StreamEvent(chunk)
