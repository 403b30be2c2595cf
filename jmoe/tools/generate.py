"""``jmoe generate``: completions of prompts, streamed as text or reported as JSON."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

from jmoe.engine.build import BuildProgress, build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine
from jmoe.engine.request import Output, Request, SamplingParams

DEFAULT_MAX_TOKENS = 128


def print_streamed(
    model: str | Path,
    settings: EngineSettings,
    prompts: list[str],
    params: SamplingParams,
    progress: BuildProgress,
    out: TextIO,
) -> None:
    """Prints the completions on ``out``, each with a line end: a single one while it is generated, several
    after all have ended."""
    texts = [""] * len(prompts)

    def collect(i: int, output: Output) -> None:
        texts[i] += output.text

    with closing(build_engine(model, settings, progress, scores_prompts=False)) as engine:
        if len(prompts) == 1:
            run_all(
                engine, prompts, params, lambda _i, output: print(output.text, end="", file=out, flush=True)
            )
            print(file=out)
            return
        run_all(engine, prompts, params, collect)
    for text in texts:
        print(text, file=out)


def generate(
    model: str | Path,
    settings: EngineSettings,
    prompts: list[str],
    params: SamplingParams,
    progress: BuildProgress,
) -> dict[str, Any]:
    """Returns the report that ``jmoe generate --json`` prints."""
    made: list[list[Output]] = [[] for _ in prompts]

    with closing(build_engine(model, settings, progress, scores_prompts=False)) as engine:
        start = time.perf_counter()
        requests = run_all(engine, prompts, params, lambda i, output: made[i].append(output))
        seconds = time.perf_counter() - start
        moe = engine.moe_stats()
    outputs = [_report(request, parts) for request, parts in zip(requests, made, strict=True)]
    return {"outputs": outputs, "seconds": seconds, "moe": moe}


def _report(request: Request, outputs: list[Output]) -> dict[str, Any]:
    """Returns one completion of the report; "thoughts" only for a model that answers in channels."""
    thoughts = "".join(part.thoughts for part in outputs)
    return {
        "prompt_token_ids": request.prompt_token_ids,
        "text": "".join(part.text for part in outputs),
        **({"thoughts": thoughts} if thoughts else {}),
        "token_ids": request.token_ids,
        "finish_reason": outputs[-1].finish_reason,
    }


def run_all(
    engine: Engine, prompts: list[str], params: SamplingParams, receive: Callable[[int, Output], None]
) -> list[Request]:
    """Runs every prompt to its end; ``receive`` gets (prompt index, increment). If max_tokens is None, it is
    128, or as many as the context holds after the prompt."""
    if engine.codec is None:
        raise ValueError("this model directory has no tokenizer.json; text prompts need one")
    arrived = time.monotonic()

    def emit(i: int) -> Callable[[Output], None]:
        return lambda output: receive(i, output)

    encoded = [engine.codec.encode(prompt, limit=engine.max_model_len) for prompt in prompts]
    requests = [
        Request(str(i), ids, _fitted(params, engine.max_model_len - len(ids)).with_seed(), emit(i), arrived)
        for i, ids in enumerate(encoded)
    ]
    engine.run(requests)
    return requests


def _fitted(params: SamplingParams, room: int) -> SamplingParams:
    """Returns ``params`` with the default max_tokens, as far as there is room; without room the engine
    reports the limit."""
    if params.max_tokens is not None or room < 1:
        return params
    return dataclasses.replace(params, max_tokens=min(DEFAULT_MAX_TOKENS, room))
