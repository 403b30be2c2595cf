"""Sends an answer: whole, or as server-sent events while it grows."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jmoe.engine.request import Output
from jmoe.server.answers import AnswerFormat, Usage
from jmoe.server.errors import ApiError, json_response
from jmoe.server.generation import ClientLeft, Generation, unless_client_leaves
from jmoe.server.schema import StreamOptions

log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


async def whole_answer(
    request: Request, generation: Generation, form: AnswerFormat, usage: Usage, head: dict[str, Any]
) -> Response:
    """One JSON object, once every choice has finished."""

    async def collect() -> list[list[Output]]:
        collected: list[list[Output]] = [[] for _ in generation.requests]
        async for index, output in generation.outputs():
            collected[index].append(output)
            usage.add(output)
        return collected

    try:
        collected: Any = await unless_client_leaves(request.receive, collect())
    except ClientLeft:
        return Response(status_code=499)  # nobody reads it
    finally:
        generation.close()
    choices = [form.choice(i, outputs) for i, outputs in enumerate(collected)]
    return json_response({**head, "object": form.object, "choices": choices, "usage": usage.report()})


async def stream_events(
    generation: Generation,
    form: AnswerFormat,
    usage: Usage,
    head: dict[str, Any],
    options: StreamOptions | None,
) -> AsyncIterator[bytes]:
    """The events of a streamed answer, ``[DONE]`` last. A failure is an event: the status is already sent."""
    options = options or StreamOptions()
    head = {**head, "object": form.chunk_object}
    running = bool(options.include_usage and options.continuous_usage_stats)

    def chunk(choices: list[dict[str, Any]], counted: bool = running) -> bytes:
        """The usage is null in a chunk that does not have it, where it was requested."""
        shown = {"usage": usage.report() if counted else None} if options.include_usage else {}
        return event({**head, "choices": choices, **shown})

    try:
        for choice in form.opening():
            yield chunk([choice])
        async for index, output in generation.outputs():
            usage.add(output)
            yield chunk([form.delta(index, output)])
        if options.include_usage:
            yield chunk([], counted=True)
    except ApiError as error:
        yield event(error.envelope())
    except Exception:
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
