"""The loss of quality by a server's lossy settings, measured over HTTP: each text with and without ``exact``.

Prompt scoring (``echo`` and ``logprobs``) covers only prefill. Techniques that act in decode, such as
binning, show in the generated text: greedy answers as served and exact ones are both scored by the exact
model, which would have written the exact ones.
"""

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from jmoe.tools.bench.answers import read_json
from jmoe.tools.bench.http import Client

EXACT = {"moe": {"exact": True}}
PATH = "/v1/completions"


@dataclass(frozen=True)
class ServerScorer:
    """Scores and continues token ids on a server.

    client: connection to the server.
    model: served model name.
    concurrency: number of requests at a time; lossy techniques act on batches, so several should run
        together.
    """

    client: Client
    model: str
    concurrency: int = 8

    async def score(self, ids: list[int], start: int, *, exact: bool) -> list[float]:
        """Returns the log-probabilities of ``ids[start:]``, each conditional on all ids before it; start is
        at least 1."""
        ask = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
        choice = await self._ask(ask, exact)
        return choice["logprobs"]["token_logprobs"][start : len(ids)]

    async def continue_greedily(self, ids: list[int], tokens: int, *, exact: bool) -> list[int]:
        ask = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        choice = await self._ask({**ask, "return_token_ids": True}, exact)
        return choice["token_ids"]

    async def _ask(self, ask: dict[str, Any], exact: bool) -> dict[str, Any]:
        body = {"model": self.model, **ask, **(EXACT if exact else {})}
        answer = await self.client.send("POST", PATH, msgspec.json.encode(body))
        return read_json(answer, "quality")["choices"][0]

    async def each(self, make: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Awaits ``make(item)`` for every item, ``concurrency`` at a time; the results are in order."""
        room = asyncio.Semaphore(self.concurrency)

        async def one(item: Any) -> Any:
            async with room:
                return await make(item)

        return list(await asyncio.gather(*(one(item) for item in items)))


async def prompt_quality(scorer: ServerScorer, windows: list[list[int]]) -> dict[str, float]:
    """Returns the perplexity of the windows as served and exact; a window's first token is not scored."""
    nll = {}
    for exact in (False, True):
        scored = await scorer.each(lambda ids, exact=exact: scorer.score(ids, 1, exact=exact), windows)
        nll[exact] = -sum(map(sum, scored))
    tokens = sum(len(ids) - 1 for ids in windows)
    return {
        "tokens": tokens,
        "perplexity": math.exp(nll[False] / tokens),
        "perplexity_exact": math.exp(nll[True] / tokens),
        "nll_difference": (nll[False] - nll[True]) / tokens,
    }


async def decode_quality(scorer: ServerScorer, windows: list[list[int]]) -> dict[str, float]:
    """Continues the first half of each window by as many tokens, as served and exactly, and compares both."""
    halves = [ids[: len(ids) // 2] for ids in windows]
    answers, nll = {}, {}
    for exact in (False, True):
        answers[exact] = await scorer.each(
            lambda ids, exact=exact: scorer.continue_greedily(ids, len(ids), exact=exact), halves
        )
        pairs = zip(halves, answers[exact], strict=True)
        scored = await scorer.each(
            lambda pair: scorer.score(pair[0] + pair[1], len(pair[0]), exact=True), pairs
        )
        nll[exact] = -sum(map(sum, scored))
    tokens = sum(map(len, halves))
    equal = sum(
        a == b
        for served, right in zip(answers[False], answers[True], strict=True)
        for a, b in zip(served, right, strict=True)
    )
    return {
        "tokens": tokens,
        "equal_share": equal / tokens,
        "nll": nll[False] / tokens,
        "nll_exact": nll[True] / tokens,
        "nll_difference": (nll[False] - nll[True]) / tokens,
    }


async def quality(scorer: ServerScorer, windows: list[list[int]]) -> dict[str, dict[str, float]]:
    """Returns both qualities; the windows have at least two tokens. It raises Failure if the server refuses a
    request."""
    return {
        "prompt": await prompt_quality(scorer, windows),
        "decode": await decode_quality(scorer, windows),
    }
