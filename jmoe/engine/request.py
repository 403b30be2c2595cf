"""What a caller asks for and what comes back, as plain data."""

from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
from msgspec import Meta

from jmoe.config.counters import USAGE, names
from jmoe.config.reading import check_fields
from jmoe.engine.page_names import PageNames

MAX_LOGPROBS = 20
MAX_BIASES = 256
MAX_STOPS = 64  # a request's 16, and the model's own that end a turn
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    max_tokens: tokens to generate at most; None = up to the end of the context; 0 only scores the prompt.
    temperature: 0 is greedy. top_p: 0 keeps the likeliest token. top_k: 0 or -1 is off.
    min_p: tokens less likely than this share of the likeliest one's probability are never drawn.
    seed: None draws one. logit_bias: (token id, addend) pairs.
    stop: strings that end the text (and are cut from it). stop_token_ids: ids that end it.
    logprobs: alternatives reported for each generated token, None = none. prompt_logprobs: the same for
    the prompt's tokens. exact: opt out of every lossy technique of the MoE layers. cache_salt: the prompt's
    cached pages are shared only with requests that give the same one. Raises ValueError naming the field and
    its limit.
    """

    max_tokens: int | None = 16
    temperature: Annotated[float, Meta(ge=0, le=2, description="between 0 and 2")] = 1.0
    top_p: Annotated[float, Meta(ge=0, le=1, description="between 0 and 1")] = 1.0
    top_k: int = 0
    min_p: Annotated[float, Meta(ge=0, le=1, description="between 0 and 1")] = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    exact: bool = False
    cache_salt: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, got {self.max_tokens}")
        if self.top_k < -1:
            raise ValueError(f"top_k must be at least -1 (-1 and 0 are off), got {self.top_k}")
        if len(self.logit_bias) > MAX_BIASES or not all(-100 <= b <= 100 for _, b in self.logit_bias):
            raise ValueError(f"logit_bias must be at most {MAX_BIASES} tokens with addends from -100 to 100")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit 64 bits, got {self.seed}")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise ValueError(f"min_tokens must be between 0 and max_tokens, got {self.min_tokens}")
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise ValueError(f"stop must be at most {MAX_STOPS} non-empty strings")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise ValueError(f"{name} must be between 0 and {MAX_LOGPROBS}, got {value}")


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability (natural, of the unmodified distribution) and the most likely alternatives.

    top: (token id, log-probability) by falling probability, always holding the token itself.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class MoEUsage(make_dataclass("Counts", [(name, int, 0) for name in names(USAGE)])):
    """A request's assignments of tokens to experts over all layers, and what lossy techniques did to them:
    a number for each name of ``USAGE``."""


@dataclass(frozen=True)
class Output:
    """One increment of a request's answer; the last one carries ``finish_reason``.

    text is what became certain: it never holds half a character nor the beginning of a stop string.
    thoughts: likewise, what a model that answers in channels says in others than the final one.
    prompt_logprobs comes once, with the first increment: one entry a prompt token, None for the first.
    error: for ``finish_reason`` "error", the one-line cause.
    invalid: whether what the request asked for is that cause, so that trying it again cannot help.
    moe: with the last one, where anything lossy is configured.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    thoughts: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    invalid: bool = False
    moe: MoEUsage | None = None


class Constraint(Protocol):
    """What the tokens of one answer may be: a grammar, and how far the answer has come in it.

    allowed: uint32 ``[ceil(vocabulary / 32)]``, bit t % 32 of word t // 32: whether token t may come next;
    at least one may, the end-of-text token where the answer may end. accept: the token that came. Both are
    called from the engine's thread.
    """

    def allowed(self) -> np.ndarray: ...
    def accept(self, token_id: int) -> None: ...


@dataclass(eq=False)
class Request:
    """A request in the engine. Times are ``time.monotonic`` seconds. constraint: None lets every token come.

    emit is called from the engine's thread with every increment and must not block. place: what the
    scheduler knows of it. cached_tokens: those of the prompt that were found in pages when it first entered.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    emit: Callable[[Output], None]
    arrived: float
    constraint: Constraint | None = None
    token_ids: list[int] = field(default_factory=list)
    place: "Place" = field(default_factory=lambda: Place())
    started: float | None = None
    first_token: float | None = None
    moe: MoEUsage = field(default_factory=MoEUsage)
    cached_tokens: int = 0

    @property
    def length(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt_token_ids, *self.token_ids]

    def part(self, start: int, count: int) -> list[int]:
        """Its tokens from position ``start`` on, ``count`` or as many as are known."""
        n = len(self.prompt_token_ids)
        generated = self.token_ids[max(start - n, 0) : max(start + count - n, 0)]
        return [*self.prompt_token_ids[start : start + count], *generated]


@dataclass
class Place:
    """Where a request is. Counts are of tokens and include those of steps that were started.

    number: it came in as. passed: how often later ones were let in before it. rank, seat, pages: its own
    while it runs; a seat is a number that no other running one has, below the most that can run. names: of
    its pages, None where they are not shared; named: how many were told. begun: tokens found in pages when it
    entered. goal: those to run through as a prompt. computed: those whose keys and values are in the pages.
    drawn: those the device has drawn and the host has not seen. ended: nothing of it is wanted any more.
    """

    number: int = -1
    passed: int = 0
    rank: int = -1
    seat: int = -1
    pages: list[int] = field(default_factory=list)
    names: PageNames | None = None
    named: int = 0
    begun: int = 0
    goal: int = 0
    computed: int = 0
    drawn: int = 0
    ended: bool = False


@dataclass(frozen=True)
class EngineSnapshot:
    """The engine at one moment. kv_usage: share of KV pages in use, 0 to 1.

    Since the start: compilations_after_warmup; preemptions, requests that lost their pages to older ones;
    prefix_queries, prompt tokens that were looked up in cached pages, and prefix_hits, those found there.
    """

    running: int
    waiting: int
    kv_usage: float
    alive: bool
    compilations_after_warmup: int
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


@dataclass(frozen=True)
class StepReport:
    """One step: the prompt tokens and the decoded ones in it, seconds from its start to its results on the
    host, and those of them that the host was busy for it."""

    prompt_tokens: int
    decode_tokens: int
    seconds: float
    host_seconds: float


class QueueFull(Exception):
    """The queue holds as many requests as it may; try again later."""


class EngineDead(Exception):
    """The engine's loop has ended; no request can be served."""
