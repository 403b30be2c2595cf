"""Sends an answer: whole, or as server-sent events while it grows."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jmoe.engine.request import Output
from jmoe.server.answer.formats import AnswerFormat, Usage
from jmoe.server.answer.generation import ClientLeft, Generation, unless_client_leaves
from jmoe.server.errors import ApiError, json_response
from jmoe.server.request.schema import StreamOptions

log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"
HEAVY = 2000  # more log-probability entries than this are formatted on a thread: it takes some milliseconds
PIECE = 64  # list items encoded in one call, during which no other thread runs
PIECE_BYTES = 64 * 1024  # bytes of an answer written at a time


@dataclass(frozen=True)
class Answer:
    """A generation and how it is sent.

    generation: the engine requests of the answer and their outputs.
    form: format of the choices.
    usage: token counts of the answer.
    head: first fields of the answer and of each chunk.
    in_thread: runs a slow function on a thread.
    """

    generation: Generation
    form: AnswerFormat
    usage: Usage
    head: dict[str, Any]
    in_thread: Callable[..., Awaitable[Any]]

    def is_heavy(self, tokens: int, prompt_tokens: int) -> bool:
        """Whether formatting this many tokens takes long: each may have alternatives, all as text."""
        params = self.generation.requests[0].params
        named = tokens * (1 + (params.logprobs or 0)) + prompt_tokens * (1 + (params.prompt_logprobs or 0))
        return named > HEAVY


def encoded(value: Any, depth: int = 4) -> Iterator[bytes]:
    """Encodes JSON in pieces that are each made quickly: objects and lists are split down to ``depth``, and
    long lists into ``PIECE`` items at a time."""
    if isinstance(value, dict) and depth:
        for i, (key, item) in enumerate(value.items()):
            yield (b"," if i else b"{") + msgspec.json.encode(key) + b":"
            yield from encoded(item, depth - 1)
        yield b"}" if value else b"{}"
    elif isinstance(value, list) and value and depth and isinstance(value[0], dict):
        for i, item in enumerate(value):
            yield b"," if i else b"["
            yield from encoded(item, depth - 1)
        yield b"]"
    elif isinstance(value, list) and len(value) > PIECE:
        for start in range(0, len(value), PIECE):
            yield (b"," if start else b"[") + msgspec.json.encode(value[start : start + PIECE])[1:-1]
        yield b"]"
    else:
        yield msgspec.json.encode(value)


def joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, ``PIECE_BYTES`` or a little more at a time."""
    part = bytearray()
    for piece in pieces:
        part += piece
        if len(part) >= PIECE_BYTES:
            yield bytes(part)
            part.clear()
    if part:
        yield bytes(part)


def event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


async def whole_answer(request: Request, answer: Answer) -> Response:
    """Returns one JSON object after every choice has finished."""
    generation, form, usage = answer.generation, answer.form, answer.usage
    collected: list[list[Output]] = [[] for _ in generation.requests]

    async def collect() -> None:
        async for index, output in generation.outputs():
            collected[index].append(output)
            usage.add(output)

    def whole() -> dict[str, Any]:
        choices = [form.choice(i, outputs) for i, outputs in enumerate(collected)]
        return {**answer.head, "object": form.object, "choices": choices, "usage": usage.report()}

    try:
        await unless_client_leaves(request.receive, collect())
    except ClientLeft:
        return Response(status_code=499)  # nobody reads it
    finally:
        generation.close()
    prompt_tokens = sum(len(r.prompt_token_ids) for r in generation.requests)
    if answer.is_heavy(usage.completion_tokens, prompt_tokens):
        return PiecesResponse(await answer.in_thread(lambda: list(joined(encoded(whole())))))
    return json_response(whole())


class PiecesResponse(Response):
    """A JSON response of several pieces that are not copied into one."""

    def __init__(self, pieces: list[bytes]):
        super().__init__(media_type="application/json")
        self.headers["content-length"] = str(sum(map(len, pieces)))
        self.pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # a client that reads everything at once must not occupy the event loop
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def stream_events(answer: Answer, options: StreamOptions | None) -> AsyncIterator[bytes]:
    """The events of a streamed answer, ``[DONE]`` last. A failure is an event: the status is already sent."""
    form, usage, options = answer.form, answer.usage, options or StreamOptions()
    head = {**answer.head, "object": form.chunk_object}
    running = bool(options.include_usage and options.continuous_usage_stats)

    def chunk(choices: list[dict[str, Any]], counted: bool = running) -> dict[str, Any]:
        """If usage was requested, it is null in a chunk that does not count it."""
        shown = {"usage": usage.report() if counted else None} if options.include_usage else {}
        return {**head, "choices": choices, **shown}

    def parts(index: int, output: Output) -> list[bytes]:
        return list(joined([b"data: ", *encoded(chunk([form.delta(index, output)])), b"\n\n"]))

    try:
        for choice in form.opening():
            yield event(chunk([choice]))
        async for index, output in answer.generation.outputs():
            usage.add(output)
            if answer.is_heavy(len(output.token_ids), len(output.prompt_logprobs or ())):
                for part in await answer.in_thread(parts, index, output):
                    yield part
            else:
                yield event(chunk([form.delta(index, output)]))
        if options.include_usage:
            yield event(chunk([], counted=True))
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except ApiError as error:
        yield event(error.envelope())
    except BaseException:  # a panic of a Rust library is not an Exception
        log.exception("a stream failed: %s", head["id"])
        yield event(ApiError(500, f"internal error (request {head['id']})").envelope())
    yield DONE


class EventStream(Response):
    """A response of server-sent events that closes its generation however it ends."""

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]  # unknown; the server sends chunks
        self.generation, self.events = generation, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_all() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self.events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_client_leaves(receive, send_all())
        except ClientLeft:
            pass
        finally:
            self.generation.close()
