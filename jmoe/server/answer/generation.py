"""The engine requests of one HTTP request, and their outputs on the event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, Future

from jmoe.engine.faults import contained
from jmoe.engine.request import EngineDead, Output, QueueFull, Request
from jmoe.server.engine_api import EngineProtocol
from jmoe.server.errors import ApiError, draining, engine_dead, invalid, refused, timed_out, unavailable

BREATH = 0.005  # seconds after which a generation with many outputs lets other tasks run


class Generation:
    """Running answers, with the numbers that the choices will have. It is created on the event loop that
    reads them.

    The caller that starts a generation closes it: ``close`` aborts the answers that still run.

    on_close: function that ``close`` calls with this generation.
    timeout: seconds from now that all answers together may take; None = no limit.
    requests: the engine's request of each answer, from ``start`` on.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        executor: Executor,
        on_close: Callable[["Generation"], None],
        timeout: float | None = None,
    ):
        self.engine, self.executor, self.on_close = engine, executor, on_close
        self.grammar_field: str | None = None
        self.loop, self.timeout = asyncio.get_running_loop(), timeout
        self.deadline = None if timeout is None else self.loop.time() + timeout
        # A queue never holds more than max_tokens increments an answer.
        self.queue: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self.requests: list[Request] = []
        self.unfinished_ids: set[str] = set()
        self.finish_reasons: dict[str, str] = {}  # finish reason of each ended request, by id

    def emit(self, index: int, output: Output) -> None:
        """Takes the next increment of choice ``index``, on any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, output))

    async def start(self, requests: list[Request], prompt_field: str, grammar_field: str | None) -> None:
        """Queues all requests, whose increments come to ``emit``, or raises an ApiError.

        The engine takes requests between two steps, so a thread waits for it.

        prompt_field: request field named in the error if a prompt is refused.
        grammar_field: request field named in the error if an answer cannot go on in its grammar.
        """
        self.requests, self.grammar_field = requests, grammar_field
        self.unfinished_ids = {request.id for request in requests}
        future = self.executor.submit(contained, self.engine.submit, requests)
        try:
            async with self._in_time():
                await self._or_abort(future)
        except ValueError as error:
            raise refused(error, prompt_field) from None
        except QueueFull as error:
            raise unavailable(str(error) or "the queue is full", "queue_full") from None
        except EngineDead:
            raise engine_dead() from None

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Yields (choice, increment) until every choice has finished; raises ApiError if one fails."""
        breath = self.loop.time() + BREATH
        while self.unfinished_ids:
            async with self._in_time():
                if self.loop.time() > breath:  # queued outputs are read without a pause
                    await asyncio.sleep(0)
                    breath = self.loop.time() + BREATH
                index, output = await self.queue.get()
            if output.finish_reason in ("error", "abort"):
                raise self._failure(output)
            if output.finish_reason is not None:
                self.unfinished_ids.discard(output.request_id)
                self.finish_reasons[output.request_id] = output.finish_reason
            yield index, output

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Raises an ApiError if the deadline passes inside the block."""
        try:
            async with asyncio.timeout_at(self.deadline):
                yield
        except TimeoutError:
            self.finish_reasons |= dict.fromkeys(self.unfinished_ids, "timeout")
            raise timed_out(self.timeout or 0) from None

    async def _or_abort(self, future: Future[None]) -> None:
        try:
            await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda _: self._abort())  # it may be queued after this point
            raise

    def stop(self) -> None:
        """Makes ``outputs`` fail as in a shutdown."""
        self.queue.put_nowait((0, Output("", finish_reason="abort")))

    def close(self) -> None:
        self._abort()
        self.unfinished_ids.clear()
        self.on_close(self)

    def _abort(self) -> None:
        if self.unfinished_ids:
            with contextlib.suppress(EngineDead):
                self.engine.abort(sorted(self.unfinished_ids))

    def _failure(self, output: Output) -> ApiError:
        if not self.engine.snapshot().is_alive:
            return engine_dead()
        if output.finish_reason == "abort":  # not by ``close``, after which nobody reads
            return draining()
        if output.is_invalid:
            return invalid(f"{self.grammar_field} cannot be used: {output.error}", self.grammar_field)
        return ApiError(500, f"{output.error or 'the engine failed'} (request {output.request_id})")


class ClientLeft(Exception):
    """Raised when the client has closed its connection: nobody reads the answer."""


async def unless_client_leaves(receive: Callable[[], Awaitable], work: Awaitable) -> object:
    """Returns what ``work`` returns; if the client leaves first, cancels the work and raises ClientLeft.

    Starlette does not cancel a plain handler when its client leaves, so the connection is watched here.
    """

    async def departure() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(departure())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientLeft
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
