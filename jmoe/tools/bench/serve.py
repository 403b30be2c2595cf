"""``jmoe bench serve``: queries the server's model, prepares every request, sends the load, reports."""

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from jmoe.tools.bench.http import Client, Failure
from jmoe.tools.bench.loads import LengthLimits, Load, clip, read_trace, synthetic
from jmoe.tools.bench.measures import details, summary
from jmoe.tools.bench.prompts import COMMON, PromptSource
from jmoe.tools.bench.quality import ServerScorer, quality
from jmoe.tools.bench.replay import generate, replay
from jmoe.tools.bench.server_info import ServedModel, hit_rate, prefix_counts, served_model, tokenize
from jmoe.tools.data import bounded, read_documents, round_robin, windows

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
POOL = 200_000  # characters of --data that prompts are cut from
PIECE = 20_000  # characters sent in one /tokenize request
TEMPLATE_ROOM = 32  # tokens of the context reserved for a chat's template
GOODPUT = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class ServeOptions:
    """The flags of ``jmoe bench serve``, with their names. The constructor raises ValueError for a bad value.

    base_url: address of the server.
    served_model: model name; None = the server's only one.
    api_key: key of the server.
    endpoint: route of the requests.
    trace: recorded trace; None = random prompts.
    time_scale: factor of a trace's times; 0 sends all requests at once.
    length_scale: factor of a trace's lengths.
    max_requests: number of requests that are read from a trace.
    max_input_len, max_output_len: longest prompt and answer; longer ones are cut and counted.
    input_len, output_len: number of tokens of a random prompt and of its answer.
    num_prompts: number of random prompts.
    request_rate: requests per second.
    burstiness: 1 is Poisson arrivals; less is burstier.
    max_concurrency: number of requests that may run at once.
    seed: seed of prompts and arrivals.
    data: files whose text the prompts are taken from.
    prompt_form: token ids or words; None = the form that the endpoint takes.
    vocab_size: number of token ids to draw from, for servers without /tokenize.
    temperature: temperature of the answers.
    ignore_eos: whether answers have their full length.
    extra_body: fields to add to each request; null removes one.
    goodput: limits in ms of a good request, by name.
    num_warmups: number of short requests before the load.
    timeout: seconds for one request.
    save_details: file for every request's times.
    quality_data: files whose text is scored with lossy techniques and without them.
    quality_tokens: number of tokens to score.
    quality_concurrency: number of requests of the quality part that run at once.
    """

    base_url: str = "http://127.0.0.1:8000"
    served_model: str | None = None
    api_key: str | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    trace: Path | None = None
    time_scale: float = 1.0
    length_scale: float = 1.0
    max_requests: int | None = None
    max_input_len: int | None = None
    max_output_len: int | None = None
    input_len: int = 128
    output_len: int = 128
    num_prompts: int = 100
    request_rate: float = float("inf")
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0
    data: tuple[Path, ...] = ()
    prompt_form: Literal["ids", "text"] | None = None
    vocab_size: int | None = None
    temperature: float = 0.0
    ignore_eos: bool = True
    extra_body: dict[str, Any] = dataclasses.field(default_factory=dict)
    goodput: dict[str, float] | None = None
    num_warmups: int = 1
    timeout: float = 600.0
    save_details: Path | None = None
    quality_data: tuple[Path, ...] = ()
    quality_tokens: int = 4096
    quality_concurrency: int = 8

    def __post_init__(self) -> None:
        if self.endpoint == "chat" and self.prompt_form == "ids":
            raise ValueError(
                "a chat's messages are text: leave --prompt-form ids to the completions endpoint"
            )
        for name in ("max_requests", "max_input_len", "max_output_len", "max_concurrency", "vocab_size",
                     "quality_tokens", "quality_concurrency"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {value}")
        if self.timeout <= 0 or self.num_warmups < 0:
            raise ValueError("timeout must be above 0 and num-warmups at least 0")
        unknown = set(self.goodput or ()) - set(GOODPUT)
        if unknown:
            raise ValueError(f"goodput knows {', '.join(GOODPUT)}, got {min(unknown)!r}")

    @property
    def form(self) -> str:
        return self.prompt_form or ("text" if self.endpoint == "chat" else "ids")

    def load(self) -> Load:
        """Returns the load to send, before clipping."""
        if self.trace is None:
            lengths = self.num_prompts, self.input_len, self.output_len
            return synthetic(*lengths, self.request_rate, self.burstiness, self.seed)
        scales = {"time_scale": self.time_scale, "length_scale": self.length_scale}
        return read_trace(self.trace, **scales, max_requests=self.max_requests)

    def described(self) -> dict[str, Any]:
        """Returns the options as JSON-able values, without the API key; request_rate is None with a trace or
        if all requests are due at once."""
        values = dataclasses.asdict(self) | {"prompt_form": self.form}
        del values["api_key"]
        values["request_rate"] = (
            None if self.trace or self.request_rate == float("inf") else self.request_rate
        )
        return {k: _plain(v) for k, v in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def bench_serve(
    options: ServeOptions, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Runs the benchmark and returns the report. It raises ValueError if nothing can be measured.

    progress: function called with (ended requests, all requests).
    """
    try:
        return asyncio.run(_bench(options, progress))
    except Failure as failure:
        raise ValueError(f"{options.base_url}: {failure}") from None


async def _bench(options: ServeOptions, progress: Callable[[int, int], None]) -> dict[str, Any]:
    wanted, text = options.load(), read_text(options.data)
    client = Client(options.base_url, options.api_key, options.timeout)
    try:
        model = await served_model(client, options.served_model)
        context = model.context
        if context is not None and options.endpoint == "chat":
            context = max(2, context - TEMPLATE_ROOM)
        load, clipped = clip(wanted, LengthLimits(options.max_input_len, options.max_output_len, context))
        source = await prompt_source(client, model.name, options, text)
        bodies = [
            request_body(options, model.name, source.prompt(i, call, load.block_size), call.output_length)
            for i, call in enumerate(load.calls)
        ]
        await _warm_up(client, options, model, source)
        before = await prefix_counts(client)
        total, path = len(bodies), PATHS[options.endpoint]
        ran = await replay(
            client, path, load, bodies, options.max_concurrency, lambda done: progress(done, total)
        )
        after = await prefix_counts(client)
        report = {
            "model": model.name,
            "settings": options.described(),
            "timed": load.is_timed,
            "clipped": dataclasses.asdict(clipped),
            **summary(ran, options.goodput),
            "prefix_hit_rate": hit_rate(before, after),
            "quality": await _quality(client, options, model) if options.quality_data else None,
        }
    finally:
        client.close()
    if options.save_details is not None:
        options.save_details.write_text(json.dumps(report | {"details": details(ran.results)}) + "\n")
    return report


def read_text(paths: Sequence[Path]) -> str:
    """Returns the beginning of the files' text; raises ValueError if they hold no text."""
    text = ""
    for document in round_robin([read_documents(path) for path in paths]):
        text += document + "\n"
        if len(text) >= POOL:
            break
    if paths and not text.strip():
        raise ValueError(f"{paths[0]} holds no text")
    return text[:POOL]


async def prompt_source(client: Client, model: str, options: ServeOptions, text: str) -> PromptSource:
    """Returns the source of prompts: ``text`` in its order. Without a text, it is common words, or token ids
    drawn uniformly from --vocab-size or from the ids of common words. It raises ValueError if ids are wanted
    and unknown."""
    if options.form == "text":
        return PromptSource((text or COMMON).split(), is_text=bool(text), seed=options.seed)
    if options.vocab_size is not None and not text:
        return PromptSource(range(options.vocab_size), is_text=False, seed=options.seed)
    try:
        pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)] or [COMMON]
        ids = [token for piece in pieces for token in await tokenize(client, model, piece)]
    except Failure as failure:
        raise ValueError(f"{failure}: give --vocab-size, or --prompt-form text") from None
    return PromptSource(ids if text else sorted(set(ids)), is_text=bool(text), seed=options.seed)


def request_body(options: ServeOptions, model: str, units: list, output_length: int) -> bytes:
    """Returns the body of a streamed generation; a null in --extra-body removes a field."""
    content: Any = " ".join(units) if options.form == "text" else units
    prompt: dict[str, Any] = {"prompt": content}
    if options.endpoint == "chat":
        prompt = {"messages": [{"role": "user", "content": content}]}
    body = {
        "model": model,
        **prompt,
        "max_tokens": output_length,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True if options.ignore_eos else None,
        **options.extra_body,
    }
    return msgspec.json.encode({k: v for k, v in body.items() if v is not None})


async def _warm_up(client: Client, options: ServeOptions, model: ServedModel, source: PromptSource) -> None:
    """Sends short requests that are not measured; raises Failure if one fails, since the others would fail
    too."""
    for number in range(options.num_warmups):
        body = request_body(options, model.name, source.draw(2, number, 8), 2)
        result = await generate(client, PATHS[options.endpoint], body, 2)
        if result.cause is not None:
            raise Failure(f"the first request failed: {result.cause}")


async def _quality(client: Client, options: ServeOptions, model: ServedModel) -> dict[str, Any]:
    length = min(model.context or 1024, 1024)
    documents = round_robin([read_documents(path) for path in options.quality_data])
    texts = itertools.islice(documents, options.quality_tokens)  # each document scores at least one token
    found: list[list[int]] = []
    for text in texts:
        ids = await tokenize(client, model.name, text[: 8 * length])
        found += windows([ids], length)
        if sum(len(ids) - 1 for ids in found) >= options.quality_tokens:
            break
    found = [ids for ids in bounded(found, options.quality_tokens) if len(ids) > 1]
    if not found:
        raise ValueError(f"{options.quality_data[0]} holds no window of two tokens: nothing to score")
    return await quality(ServerScorer(client, model.name, options.quality_concurrency), found)
