"""Sends the requests of a load: by the clock, or as soon as there is room for one more."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from jmoe.tools.bench.answers import Result, read_stream
from jmoe.tools.bench.http import Client, Failure
from jmoe.tools.bench.loads import Load


@dataclass(frozen=True)
class Replay:
    """A load that was sent.

    results: results in the order of the calls.
    seconds: time from the first request to the end of the last answer.
    cpu_seconds: CPU time of this process in that time.
    """

    results: list[Result]
    seconds: float
    cpu_seconds: float


async def replay(
    client: Client,
    path: str,
    load: Load,
    bodies: list[bytes],
    max_concurrency: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Replay:
    """Sends ``bodies[i]`` to ``path`` when ``load.calls[i]`` is due.

    A request that is due waits for room under ``max_concurrency``; a result's lag is the time by which this
    process was late to send it, without that wait.
    """
    room = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    start, cpu, done = time.perf_counter(), time.process_time(), 0

    async def one(index: int) -> Result:
        nonlocal done
        call = load.calls[index]
        lag = max(0.0, time.perf_counter() - start - call.due_time) if load.is_timed else 0.0
        async with room:
            result = await generate(client, path, bodies[index], call.output_length)
        result.lag = lag
        done += 1
        progress(done)
        return result

    tasks = []
    for index, call in enumerate(load.calls):
        if load.is_timed and (wait := start + call.due_time - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(index)))
    results = list(await asyncio.gather(*tasks))
    return Replay(results, time.perf_counter() - start, time.process_time() - cpu)


async def generate(client: Client, path: str, body: bytes, max_tokens: int) -> Result:
    """Sends one request and returns its result, also if it fails."""
    send_time = time.perf_counter()
    try:
        return read_stream(await client.send("POST", path, body), max_tokens)
    except Failure as failure:
        return Result(send_time=send_time, end_time=time.perf_counter(), cause=str(failure))
