"""The requests of a benchmark and their times: recorded traces and synthetic loads, and their clipping."""

import dataclasses
import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 512  # tokens for which one of a trace's hash_ids stands


@dataclass(frozen=True)
class LoadCall:
    """One request.

    due_time: seconds after the start at which it is due.
    input_length: tokens of the prompt.
    output_length: tokens of the answer.
    blocks: numbers of the blocks of which the prompt consists, each whole but the last; empty = the prompt
        shares no blocks.
    """

    due_time: float
    input_length: int
    output_length: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Load:
    """The calls of a benchmark.

    calls: calls in the order of their times.
    is_timed: whether calls are due at their times; otherwise all are due at once.
    block_size: tokens of a block of ``LoadCall.blocks``.
    """

    calls: list[LoadCall]
    is_timed: bool
    block_size: int = BLOCK


@dataclass(frozen=True)
class LengthLimits:
    """Limits in tokens; None = no limit.

    max_input: limit on the prompt.
    max_output: limit on the answer.
    context: limit on prompt and answer together.
    """

    max_input: int | None = None
    max_output: int | None = None
    context: int | None = None


@dataclass(frozen=True)
class Clipped:
    """Counts of the changes that clipping made to a load.

    input: number of calls shortened by max_input.
    output: number of calls shortened by max_output.
    context: number of calls shortened to fit the context.
    input_tokens: prompt tokens removed in total.
    output_tokens: answer tokens removed in total.
    """

    input: int = 0
    output: int = 0
    context: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


def read_trace(
    path: Path, *, time_scale: float = 1.0, length_scale: float = 1.0, max_requests: int | None = None
) -> Load:
    """Reads the calls of a ``.jsonl(.gz)`` with ``timestamp`` (ms), ``input_length``, ``output_length`` and,
    as in Mooncake's traces, ``hash_ids``.

    It raises ValueError that names a line without these fields.

    time_scale: factor of the times.
    length_scale: factor of the lengths, also of a block's.
    max_requests: the most calls to read; None = all.
    """
    if time_scale < 0 or length_scale <= 0:
        raise ValueError("time-scale must be at least 0 and length-scale above 0")
    block = max(1, round(BLOCK * length_scale))
    calls: list[LoadCall] = []
    for number, item in _lines(path):
        if max_requests is not None and len(calls) == max_requests:
            break
        try:
            at = float(item["timestamp"]) / 1000 * time_scale
            lengths = [max(1, round(int(item[k]) * length_scale)) for k in ("input_length", "output_length")]
            blocks = tuple(int(i) for i in item.get("hash_ids", ()))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"{path} line {number} is not an object with timestamp, input_length and output_length"
            ) from None
        if not math.isfinite(at) or at < 0:
            raise ValueError(f"{path} line {number}: timestamp must be at least 0")
        if blocks:
            lengths[0] = min(lengths[0], len(blocks) * block)  # rounding may add a token
        calls.append(LoadCall(at, lengths[0], lengths[1], blocks))
    if not calls:
        raise ValueError(f"{path} holds no request")
    calls.sort(key=lambda call: call.due_time)
    first = calls[0].due_time
    calls = [dataclasses.replace(call, due_time=call.due_time - first) for call in calls]
    return Load(calls, is_timed=time_scale > 0, block_size=block)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON lines: {error}") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def synthetic(
    requests: int, input_length: int, output_length: int, rate: float, burstiness: float, seed: int
) -> Load:
    """Makes ``requests`` calls of equal lengths, ``rate`` per second on average (inf: all at once). The times
    between them are drawn from a gamma distribution of shape ``burstiness``: 1 is Poisson, less is more
    bursty."""
    if min(requests, input_length, output_length) < 1:
        raise ValueError("num-prompts, input-len and output-len must be at least 1")
    if not rate > 0 or not burstiness > 0:
        raise ValueError("request-rate and burstiness must be above 0")
    if math.isinf(rate):
        return Load([LoadCall(0.0, input_length, output_length)] * requests, is_timed=False)
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), requests - 1)
    times = np.concatenate([[0.0], np.cumsum(gaps)]).tolist()
    return Load([LoadCall(at, input_length, output_length) for at in times], is_timed=True)


def clip(load: Load, limits: LengthLimits) -> tuple[Load, Clipped]:
    """Cuts the load to ``limits``: a prompt loses its end. Tokens beyond the context are removed from the
    prompt while it has more than one token, then from the answer."""
    calls, counts = [], {"input": 0, "output": 0, "context": 0}
    for call in load.calls:
        input_length = min(call.input_length, limits.max_input or call.input_length)
        output_length = min(call.output_length, limits.max_output or call.output_length)
        counts["input"] += input_length < call.input_length
        counts["output"] += output_length < call.output_length
        if limits.context is not None and input_length + output_length > limits.context:
            counts["context"] += 1
            output_length = min(output_length, limits.context - 1)
            input_length = min(input_length, limits.context - output_length)
        calls.append(dataclasses.replace(call, input_length=input_length, output_length=output_length))
    before, after = _tokens(load.calls), _tokens(calls)
    counts |= {"input_tokens": before[0] - after[0], "output_tokens": before[1] - after[1]}
    return dataclasses.replace(load, calls=calls), Clipped(**counts)


def _tokens(calls: list[LoadCall]) -> tuple[int, int]:
    return sum(c.input_length for c in calls), sum(c.output_length for c in calls)
