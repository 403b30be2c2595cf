"""One log line every ten seconds while there is traffic."""

import asyncio
import logging

from jmoe.engine.request import EngineSnapshot
from jmoe.server.engine_api import EngineProtocol
from jmoe.server.watch.totals import Totals

log = logging.getLogger(__name__)
EVERY = 10.0  # seconds


async def log_traffic(engine: EngineProtocol, totals: Totals, every: float = EVERY) -> None:
    """Logs the traffic until cancelled. It never waits for the engine."""
    before = _counts(engine.snapshot(), totals)
    while True:
        await asyncio.sleep(every)
        snapshot = engine.snapshot()
        now = _counts(snapshot, totals)
        if now != before or snapshot.running or snapshot.waiting:
            prompt, generated, looked_up, found = (n - b for n, b in zip(now, before, strict=True))
            hits = f"{100 * found / looked_up:.1f} %" if looked_up else "-"
            speeds = f"prompt {prompt / every:.1f} tok/s, generation {generated / every:.1f} tok/s"
            requests = f"running {snapshot.running}, waiting {snapshot.waiting}"
            log.info("%s, %s, KV %.1f %%, prefix hits %s", speeds, requests, 100 * snapshot.kv_usage, hits)
        before = now


def _counts(snapshot: EngineSnapshot, totals: Totals) -> tuple[int, int, int, int]:
    return totals.prompt_tokens, totals.generation_tokens, snapshot.prefix_queries, snapshot.prefix_hits
