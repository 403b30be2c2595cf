"""Measures how long an event loop is blocked, and runs a server on this process's own loop."""

import asyncio
import contextlib
import gc
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from support.server.fake_engine import FakeEngine

from jmoe.server.run import Server, bind
from jmoe.server.service import Service
from jmoe.server.settings import ServerSettings

TICK = 0.002
LONGEST = 0.05  # seconds on a quiet machine
# Work of a known size, of which two and a half times take LONGEST on the machine where that was set.
YARDSTICK = json.dumps([{"a": i, "b": [str(i), i * 1.5]} for i in range(40_000)])
TRIES = 12  # as long as the machine is busy with something else
T = TypeVar("T")


class Gaps:
    """The gaps between turns of the loop.

    worst: longest gap in seconds. A gap is the smaller of wall time and processor time. Other processes on
        the machine lengthen wall time, and threads that run at the same time as the loop lengthen processor
        time. But whoever blocks the loop, or what it needs of the interpreter, lengthens both.
    """

    worst = 0.0

    def __init__(self) -> None:
        self.wall, self.own = time.perf_counter(), time.process_time()

    def turn(self) -> None:
        wall, own = time.perf_counter(), time.process_time()
        self.worst = max(self.worst, min(wall - self.wall, own - self.own))
        self.wall, self.own = wall, own


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[Gaps]:
    gaps = Gaps()

    async def tick() -> None:
        while True:
            await asyncio.sleep(TICK)
            gaps.turn()

    task = asyncio.create_task(tick())
    try:
        yield gaps
    finally:
        gaps.turn()
        task.cancel()


async def unheld(work: Callable[[], Awaitable[T]]) -> T:
    """Returns the result of ``work``, from one of ``TRIES`` that holds the loop for less than ``LONGEST``, or
    less than the same amount of work takes at that moment.

    Work that holds the loop does so in each try; other work of the machine does not. On a busy machine, whose
    programs share caches, every instruction takes longer: therefore a try that took too long is compared with
    work of a known size.
    """
    worst = []
    for _ in range(TRIES):
        async with watched() as gaps:
            result = await work()
        if gaps.worst < LONGEST or gaps.worst < 2.5 * yardstick():
            return result
        worst.append(gaps.worst)
    raise AssertionError(f"the loop was held for {worst} seconds")


def yardstick() -> float:
    """Returns the processor time that work of a known size takes now, in seconds."""
    start = time.thread_time()
    json.loads(YARDSTICK)
    return time.thread_time() - start


@contextlib.asynccontextmanager
async def served_here(
    engine: FakeEngine, directory=None, connection_limit=None, **changes
) -> AsyncIterator[tuple[int, Server]]:
    """Yields port and server, which runs on the running loop."""
    server = Server(Service(engine, ServerSettings(**changes), directory, "fake"), connection_limit)
    bound = bind("127.0.0.1", 0)
    gc.disable()  # ``serve`` freezes a model's objects; here are those of all other tests
    task = asyncio.create_task(server.serve([bound]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield bound.getsockname()[1], server
    finally:
        server.ask_to_stop()
        server.ask_to_stop()
        await task
        server.service.close()
        engine.closing = True
        gc.enable()
