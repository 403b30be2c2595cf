"""A generation over HTTP: the events of its stream, and what they show of its speed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from jmoe.tools.bench.http import Failure, HttpAnswer

DONE = b"[DONE]"


class StreamDelta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None


class StreamChoice(msgspec.Struct):
    text: str | None = None
    delta: StreamDelta | None = None
    finish_reason: str | None = None

    @property
    def new_text(self) -> str:
        if self.delta is None:
            return self.text or ""
        return (self.delta.content or "") + (self.delta.reasoning_content or "")


class ServerUsage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    moe: dict[str, int] | None = None


class StreamChunk(msgspec.Struct):
    choices: list[StreamChoice] = []
    usage: ServerUsage | None = None
    error: Any = None


@dataclass
class Result:
    """The result of one request. Times are ``time.perf_counter`` seconds.

    send_time: time at which the request was sent.
    first_token_time: time of the first token.
    end_time: time of the last event with a choice, or at which the request failed without an answer.
    gaps: seconds between the events of its tokens.
    input_tokens: prompt tokens that the server reported.
    output_tokens: generated tokens.
    has_usage: whether the server reported the tokens; otherwise ``output_tokens`` counts events.
    moe: what lossy techniques did to it, if the server reports it.
    cause: reason of the failure; None = it did not fail.
    lag: seconds by which it was sent late.
    """

    send_time: float = 0.0
    first_token_time: float = 0.0
    end_time: float = 0.0
    gaps: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    has_usage: bool = False
    moe: dict[str, int] | None = None
    cause: str | None = None
    lag: float = 0.0

    @property
    def token_times(self) -> list[float]:
        times = [self.first_token_time]
        for gap in self.gaps:
            times.append(times[-1] + gap)
        return times


def events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yields (completion time, data) of each server-sent event, however the bytes were split."""
    rest, now = b"", 0.0
    for now, part in pieces:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):  # OpenAI's events are one line each
                yield now, line[5:].strip()
    if rest.startswith(b"data:"):
        yield now, rest[5:].strip()


def read_stream(answer: HttpAnswer, max_tokens: int) -> Result:
    """Returns the result of a streamed answer.

    max_tokens: the most tokens that it may have.
    """
    result = Result(send_time=answer.send_time)
    if answer.status != 200:
        result.cause = f"HTTP {answer.status}: {error_text(answer.body)}"
        return result
    decoder, finished, times = msgspec.json.Decoder(StreamChunk), False, []
    for now, data in events(answer.pieces):
        if data == DONE:
            break
        try:
            chunk = decoder.decode(data)
        except msgspec.MsgspecError:
            result.cause = "an event is not a completion's chunk"
            return result
        if chunk.error is not None:
            result.cause = f"error in the stream: {_message(chunk.error)}"
            return result
        if chunk.usage is not None:
            _count(result, chunk.usage)
        for choice in chunk.choices:
            result.end_time = now
            finished = finished or choice.finish_reason is not None
            opening = choice.delta is not None and choice.delta.role is not None
            # a token may be half a character and so add no text; a chat's opening and an end are no tokens
            if choice.new_text or not (opening or choice.finish_reason):
                times.append(now)
    if not finished:
        result.cause = "the stream ended before its answer"
    elif not times:
        result.cause = "the answer holds no token"
    else:
        result.first_token_time, result.gaps = times[0], [b - a for a, b in pairwise(times)]
        if not result.has_usage:
            result.output_tokens = len(times)
        if result.output_tokens > max_tokens:
            count = result.output_tokens
            result.cause = f"the answer is longer than asked ({count} tokens for {max_tokens})"
    return result


def _count(result: Result, usage: ServerUsage) -> None:
    result.input_tokens, result.output_tokens = usage.prompt_tokens, usage.completion_tokens
    result.has_usage, result.moe = True, usage.moe


def read_json(answer: HttpAnswer, name: str) -> Any:
    """Returns the answer's JSON. It raises Failure with ``name`` if the answer is an error or not JSON."""
    if answer.status != 200:
        raise Failure(f"{name}: HTTP {answer.status}: {error_text(answer.body)}")
    try:
        return msgspec.json.decode(answer.body)
    except msgspec.MsgspecError:
        raise Failure(f"{name}: the answer is not JSON") from None


def error_text(body: bytes) -> str:
    """Returns the message in an error's body, on one line."""
    try:
        said = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        said = body.decode(errors="replace")
    if isinstance(said, dict):
        said = said.get("error", said.get("detail", said.get("message", said)))
    return _message(said)


def _message(error: Any) -> str:
    if isinstance(error, dict):
        error = error.get("message", error)
    return " ".join(str(error).split())[:200]
