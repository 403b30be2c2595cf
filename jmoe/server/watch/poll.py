"""Takes a snapshot of the server once a second while somebody reads reports; all readers share them."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec

from jmoe.engine.request import EngineDead
from jmoe.server.watch.snapshots import ReportPhase, Snapshot, window_report

log = logging.getLogger(__name__)
PERIOD = 1.0  # seconds between two snapshots
LONGEST = 60  # seconds for which snapshots are kept
STAYS = 30.0  # seconds of snapshots after the last reader: a client that polls or reloads finds a window


class SnapshotFailed(Exception):
    """Raised when no new snapshot can be taken; the next reader tries again."""


class Poll:
    """The poll, which runs on the event loop.

    A reader waits for the newest snapshot and never queues older ones, so a slow reader costs only its own
    connection.

    take: function that takes a new snapshot; it may wait for a step.
    state: function that returns the fields of each report that are not in a snapshot.
    in_thread: function that runs ``take`` and makes the reports on a thread.
    """

    def __init__(
        self,
        take: Callable[[], Snapshot],
        state: Callable[[], dict[str, Any]],
        in_thread: Callable[..., Awaitable[Any]],
    ):
        self.take, self.state, self.in_thread = take, state, in_thread
        self.snapshots: deque[Snapshot] = deque(maxlen=int(LONGEST / PERIOD) + 1)
        self.num_snapshots = 0  # since the start
        self.last_read = 0.0
        self.is_closed = False
        self.num_listeners = 0
        self._task: asyncio.Task | None = None
        self._next = asyncio.Event()  # set and replaced at each snapshot and at the end
        # Reports of the newest snapshot, as tasks: equal reports are made only once.
        self._reports: dict[tuple[int, ReportPhase], asyncio.Task[bytes]] = {}

    async def reports(self, window: int, phase: ReportPhase) -> AsyncGenerator[bytes]:
        """Yields a JSON report per snapshot until the engine or the server ends; the first may cover no time.
        It raises SnapshotFailed if no snapshot can be taken."""
        self.num_listeners += 1
        num_shown = 0  # number of the snapshot that was reported last
        try:
            self._run()
            while not self.is_closed:
                if self.snapshots and self.num_snapshots != num_shown:
                    num_shown = self.num_snapshots
                    yield await asyncio.shield(self._report(window, phase))
                elif self._task is None or self._task.done():
                    raise SnapshotFailed
                else:
                    await self._next.wait()
        finally:
            self.num_listeners -= 1
            self.last_read = time.monotonic()

    async def report(self, window: int, phase: ReportPhase) -> bytes:
        """Returns one report of the part of the window that has snapshots: one second if there was no reader
        before. It raises EngineDead if the engine has stopped."""
        async with contextlib.aclosing(self.reports(window, phase)) as reports:
            async for report in reports:
                if len(self.snapshots) > 1:
                    return report
        raise EngineDead("the engine has stopped")

    def close(self) -> None:
        """Ends every ``reports``."""
        self.is_closed = True
        self._tell()
        if self._task is not None:
            self._task.cancel()

    def _tell(self) -> None:
        self._next.set()
        self._next = asyncio.Event()

    def _run(self) -> None:
        if self._task is None or self._task.done():
            self.snapshots.clear()  # they are as old as the last reader
            self._task = asyncio.create_task(self._take_snapshots())
            self._task.add_done_callback(lambda _: self._tell())  # readers that wait see that it has ended

    async def _take_snapshots(self) -> None:
        due = time.monotonic()
        try:
            while self.num_listeners or time.monotonic() - self.last_read < STAYS:
                self.snapshots.append(await self.in_thread(self.take))
                self._reports.clear()
                self.num_snapshots += 1
                self._tell()
                due = max(due + PERIOD, time.monotonic())  # snapshots after a late one do not catch up
                await asyncio.sleep(due - time.monotonic())
        except EngineDead:
            self.close()
        except Exception:
            log.exception("the dashboard's sampling failed")

    def _report(self, window: int, phase: ReportPhase) -> "asyncio.Task[bytes]":
        found = self._reports.get((window, phase))
        if found is None:
            new = self.snapshots[-1]
            oldest = new.time - window - PERIOD / 2
            old = next(snapshot for snapshot in self.snapshots if snapshot.time >= oldest)
            head = {"t": round(time.time(), 3), **self.state()}
            found = asyncio.create_task(self._encoded_report(head, old, new, phase))
            self._reports[window, phase] = found
        return found

    async def _encoded_report(
        self, head: dict[str, Any], old: Snapshot, new: Snapshot, phase: ReportPhase
    ) -> bytes:
        return await self.in_thread(lambda: msgspec.json.encode({**head, **window_report(old, new, phase)}))
