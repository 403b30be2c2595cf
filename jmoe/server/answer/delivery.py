"""Sends an answer: whole, or as server-sent events while it grows."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jmoe.engine.request import Output, Request
from jmoe.server.answer.formats import AnswerFormat, StreamEvent
from jmoe.server.answer.generation import ClientLeft, Generation, unless_client_leaves
from jmoe.server.answer.pieces import PiecesResponse, encoded, joined
from jmoe.server.answer.replies import AnswerDetails, Head, MoEUse, PromptDetails, Usage
from jmoe.server.errors import ApiError, json_response
from jmoe.server.request.prompts import Prompt

log = logging.getLogger(__name__)
HEAVY = 2000  # more log-probability entries than this are formatted on a thread: it takes some milliseconds


class UsageCounter:
    """Token counts of one HTTP request so far; each prompt counts once for any n.

    requests: engine requests, prompt-major.
    """

    def __init__(self, prompts: Sequence[Prompt], requests: Sequence[Request]):
        self.prompt_tokens = sum(len(p.token_ids) for p in prompts)
        n = len(requests) // len(prompts)
        self.requests = [requests[i : i + n] for i in range(0, len(requests), n)]
        self.completion_tokens = self.thought_tokens = 0
        self.moe: dict[str, int] = {}

    def add(self, output: Output) -> None:
        self.completion_tokens += len(output.token_ids)
        self.thought_tokens += output.num_thought_tokens
        if output.moe is not None:
            for name, count in asdict(output.moe).items():
                self.moe[name] = self.moe.get(name, 0) + count

    def usage(self) -> Usage:
        """Returns the counts so far. If lossy techniques are possible, the counts include what these did to
        the assignments of the answers that have ended."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptDetails(self._cached_tokens()),
            completion_tokens_details=AnswerDetails(self.thought_tokens)
            if self.thought_tokens
            else msgspec.UNSET,
            moe=MoEUse(**self.moe) if self.moe else msgspec.UNSET,
        )

    def _cached_tokens(self) -> int:
        """Counts each prompt's minimum: of n answers, one computes the prompt and the others then find it."""
        return sum(min(request.num_cached_tokens for request in answers) for answers in self.requests)


@dataclass(frozen=True)
class Answer:
    """A generation and the way in which it is sent.

    generation: engine requests of the answer and their outputs.
    form: format of the answer.
    counter: token counts of the answer.
    head: first fields of the answer and of each chunk.
    in_thread: function that runs a slow function on a thread.
    """

    generation: Generation
    form: AnswerFormat
    counter: UsageCounter
    head: Head
    in_thread: Callable[..., Awaitable[Any]]

    def is_heavy(self, tokens: int, prompt_tokens: int) -> bool:
        """Returns whether formatting this many tokens takes long: each may have alternatives, all as text."""
        params = self.generation.requests[0].params
        entries = tokens * (1 + (params.logprobs or 0)) + prompt_tokens * (1 + (params.prompt_logprobs or 0))
        return entries > HEAVY


def encoded_event(event: StreamEvent) -> bytes:
    return _opening(event) + msgspec.json.encode(event.data) + b"\n\n"


def event_parts(event: StreamEvent) -> list[bytes]:
    """Encodes an event whose data is long."""
    return list(joined([_opening(event), *encoded(event.data), b"\n\n"]))


def _opening(event: StreamEvent) -> bytes:
    return b"data: " if event.name is None else b"event: " + event.name.encode() + b"\ndata: "


async def whole_answer(request: HttpRequest, answer: Answer) -> Response:
    """Returns one JSON object after every choice has finished."""
    generation, counter = answer.generation, answer.counter
    choices: list[list[Output]] = [[] for _ in generation.requests]

    async def collect() -> None:
        async for index, output in generation.outputs():
            choices[index].append(output)
            counter.add(output)

    def whole() -> msgspec.Struct:
        return answer.form.whole(answer.head, choices, counter.usage())

    try:
        await unless_client_leaves(request.receive, collect())
    except ClientLeft:
        return Response(status_code=499)  # nobody reads it
    finally:
        generation.close()
    prompt_tokens = sum(len(r.prompt_token_ids) for r in generation.requests)
    if answer.is_heavy(counter.completion_tokens, prompt_tokens):
        return PiecesResponse(await answer.in_thread(lambda: list(joined(encoded(whole())))))
    return json_response(whole())


async def stream_events(answer: Answer) -> AsyncIterator[bytes]:
    """Yields the events of a streamed answer. A failure is an event: the status is already sent."""
    form, counter, head = answer.form, answer.counter, answer.head

    def parts(index: int, output: Output) -> list[bytes]:
        events = form.increment(head, index, output, counter.usage)
        return [part for event in events for part in event_parts(event)]

    try:
        for event in form.opening(head, counter.usage):
            yield encoded_event(event)
        async for index, output in answer.generation.outputs():
            counter.add(output)
            if answer.is_heavy(len(output.token_ids), len(output.prompt_logprobs or ())):
                for part in await answer.in_thread(parts, index, output):
                    yield part
            else:
                for event in form.increment(head, index, output, counter.usage):
                    yield encoded_event(event)
        for event in form.closing(head, counter.usage):
            yield encoded_event(event)
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except ApiError as error:
        for event in form.failure(head, error, counter.usage):
            yield encoded_event(event)
    except BaseException:  # a panic of a Rust library is not an Exception
        log.exception("a stream failed: %s", head.id)
        error = ApiError(500, f"internal error (request {head.id})")
        for event in form.failure(head, error, counter.usage):
            yield encoded_event(event)
    if form.end:
        yield form.end


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
