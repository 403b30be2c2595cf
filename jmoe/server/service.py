"""The state that handlers share: engine, chat template, running generations, and whether it is draining."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from jmoe import __version__
from jmoe.engine.faults import contained
from jmoe.server.answer.generation import Generation
from jmoe.server.answer.replies import Head
from jmoe.server.answer.responses.store import ResponseStore
from jmoe.server.engine_api import EngineProtocol
from jmoe.server.errors import ApiError, draining, engine_dead
from jmoe.server.request.apis.notices import Notices
from jmoe.server.request.body import BodyBytes, read_body
from jmoe.server.request.bounds import LIGHT
from jmoe.server.request.conversation.chat_model import chat_model
from jmoe.server.request.decoding import decode
from jmoe.server.request.grammars import Grammars
from jmoe.server.request.prepared import PreparedRequest
from jmoe.server.settings import ServerSettings
from jmoe.server.template.chat_template import load_chat_template, load_turn_ends
from jmoe.server.template.tool_format import declared_template
from jmoe.server.watch.answered import Answered, Observer, log_answer
from jmoe.server.watch.metrics import Metrics
from jmoe.server.watch.poll import Poll
from jmoe.server.watch.snapshots import Snapshot, take_snapshot

Body = TypeVar("Body", bound=msgspec.Struct)
Result = TypeVar("Result")
THREADS = 64  # each may wait for a step to end; made when needed
BODIES = 8  # bodies of the largest size whose bytes may be in memory at once
# (bytes, places): long work runs only a few at a time, because threads and the event loop take turns of 5 ms.
LANES = ((256 * 1024, 2), (None, 1))


class Service:
    """The shared state; there is one per server. The constructor raises ValueError for a chat template that
    cannot be read.

    directory: model directory, which may hold a chat template; None = there is none.
    model: name of the model if the settings have none.
    """

    def __init__(self, engine: EngineProtocol, settings: ServerSettings, directory: Path | None, model: str):
        self.engine, self.facts, self.settings = engine, engine.facts, settings
        self.models = settings.served_names or (model,)
        template = None if directory is None else load_chat_template(directory, settings.chat_template)
        declared = None if directory is None else declared_template(directory)
        self.chat = chat_model(template, self.facts, settings.tool_format, declared)
        self.turn_ends = () if directory is None or self.facts.codec is None else load_turn_ends(directory)
        self.metrics = Metrics(engine)
        engine.add_listener(self.metrics)
        self.grammars = Grammars(self.facts)
        self.notices = Notices()
        self.response_store = ResponseStore() if settings.response_store else None
        self.executor = ThreadPoolExecutor(THREADS, thread_name_prefix="jmoe-server")
        self.bodies = BodyBytes(BODIES * settings.max_body_bytes)
        self.lanes = [(limit, asyncio.Semaphore(places)) for limit, places in LANES]
        self.generations: set[Generation] = set()
        self.is_draining = False
        self.start_time, self.start_clock = int(time.time()), time.monotonic()
        self.observers: list[Observer] = [self._count_answer, log_answer]
        self.poll = Poll(self._take_snapshot, self._state, self.in_thread)

    @property
    def model(self) -> str:
        """The first served name."""
        return self.models[0]

    async def read(self, request: Request, make: Callable[[bytes], Result]) -> Result:
        """Reads the request's body and returns ``make(body)``, run on a thread. It raises a 503 if no work is
        accepted."""
        self.check_ready()
        with self.bodies.one_body() as counter:
            raw = await read_body(request, self.settings, counter)
            async with self.lane(len(raw)):
                return await self.in_thread(make, raw)

    def decode(self, raw: bytes, kind: type[Body]) -> Body:
        """Decodes the body; raises a 404 if it names a model that the server does not have."""
        body = decode(raw, kind)
        self.check_model(getattr(body, "model", None))
        return body

    @contextlib.asynccontextmanager
    async def lane(self, size: int) -> AsyncIterator[None]:
        """Holds a place in the lane for work of ``size`` bytes; small work needs no place."""
        if size <= LIGHT:
            yield
            return
        async with next(places for limit, places in self.lanes if limit is None or size <= limit):
            yield

    def check_ready(self) -> None:
        """Raises a 503 while draining or without an engine."""
        self.check_alive()
        if self.is_draining:
            raise draining()

    def check_alive(self) -> None:
        if not self.engine.snapshot().is_alive:
            raise engine_dead()

    def check_model(self, name: str | None) -> None:
        if name not in (None, *self.models):
            message = f"The model {name[:200]!r} does not exist"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        """Runs a function that takes long (tokenizing megabytes) or waits for the engine."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, contained, function, *args)

    async def generate(self, id: str, prepared: PreparedRequest) -> Generation:
        """Starts the answers to a request, as parts of the answer ``id``."""
        grammar = None if prepared.grammar is None else await self.grammars.compile(prepared.grammar)
        timeout = self.settings.request_timeout
        generation = Generation(self.engine, self.executor, self.generations.discard, timeout)
        make = partial(prepared.engine_requests, id, grammar, generation.emit, time.monotonic())
        self.generations.add(generation)
        try:
            requests = make() if grammar is None else await self.in_thread(make)  # constraints take long
            await generation.start(requests, prepared.prompt_field, prepared.grammar_field)
        except BaseException:
            self.generations.discard(generation)
            raise
        return generation

    def head(self, prefix: str, model: str | None) -> Head:
        """Returns the first fields of every answer. The server makes the id, so no two live requests share
        one.

        prefix: beginning of the id.
        model: name that the request has; None = it has none.
        """
        return Head(
            id=prefix + uuid.uuid4().hex,
            created=int(time.time()),
            model=model or self.model,
            system_fingerprint=f"jmoe-{__version__}",
        )

    def _count_answer(self, answer: Answered) -> None:
        self.metrics.count_answer(answer.method, answer.status, answer.pattern)

    def _take_snapshot(self) -> Snapshot:
        """Takes a snapshot for the dashboard; it may wait for a running step."""
        return take_snapshot(self.engine.snapshot(), self.engine.moe_stats(), self.metrics.totals)

    def _state(self) -> dict[str, Any]:
        """Returns what the dashboard shows of the server itself."""
        uptime = int(time.monotonic() - self.start_clock)
        return {"name": self.model, "state": "draining" if self.is_draining else "ready", "uptime_s": uptime}

    def stop_running(self) -> None:
        """Ends each running answer with an error to its client, and ends the dashboards' events."""
        self.poll.close()
        for generation in list(self.generations):
            generation.stop()

    def close(self) -> None:
        """Shuts down the threads and the grammars' child process, which may first finish its work."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.grammars.close()
