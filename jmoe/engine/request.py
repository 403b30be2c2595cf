"""Requests of callers and their outputs, as plain data."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Annotated, Literal, Protocol, Self

import numpy as np
from msgspec import Meta

from jmoe.config.counters import USAGE, names
from jmoe.config.reading import Positive, check_fields
from jmoe.engine.grammar.caution import Caution
from jmoe.engine.page_names import PageNames
from jmoe.engine.text.markup import PLAIN, Markup

MAX_LOGPROBS = 20
MAX_BIASES = 256
MAX_BAD_SEQUENCES = 128  # of several tokens, in the bad words of a request
MAX_STOPS = 64  # a request's 16, and the model's own that end a turn
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """Parameters by which a prompt is continued. Raises ValueError naming the field and its limit.

    max_tokens: maximum number of tokens to generate; None = up to the end of the context; 0 only scores the
        prompt.
    temperature: temperature of the sampling; 0 is greedy.
    top_p: probability that the kept tokens must reach together; 0 keeps only the likeliest token.
    top_k: number of likeliest tokens that are kept; 0 or -1 is off.
    min_p: share of the likeliest token's probability; tokens less likely than this are never sampled.
    seed: seed of the sampling; None draws a random one.
    logit_bias: (token id, addend) pairs.
    frequency_penalty: number that each occurrence of a token in the answer takes from the token's logit.
    presence_penalty: number that a token loses once if the answer has it.
    repetition_penalty: factor by which the logit of a token in the prompt or the answer becomes less likely;
        below 1 it becomes likelier.
    allowed_token_ids: the only tokens that may be sampled; None allows all.
    bad_words: texts that are never completed, neither after a space nor without one.
    stop: strings that end the text (and are cut from it).
    include_stop_str_in_output: whether the stop string, or the text of the token that ends the answer, stays.
    skip_special_tokens: whether special tokens have no text; if not, the text has all of them, also the end
        token, and thoughts are not separated from it.
    stop_token_ids: token ids that end the text.
    ignore_eos: whether the text goes on after the model's own end tokens.
    min_tokens: number of tokens to generate before an end token or a stop string may end the text.
    logprobs: number of alternatives reported for each generated token; None reports no log-probabilities.
    prompt_logprobs: the same for the prompt's tokens.
    exact: whether the request opts out of every lossy technique of the MoE layers.
    cache_salt: text that the prompt's cached pages depend on: they are shared only with requests that pass
        the same.
    """

    max_tokens: int | None = 16
    temperature: Annotated[float, Meta(ge=0, le=2, description="between 0 and 2")] = 1.0
    top_p: Annotated[float, Meta(ge=0, le=1, description="between 0 and 1")] = 1.0
    top_k: int = 0
    min_p: Annotated[float, Meta(ge=0, le=1, description="between 0 and 1")] = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2, description="between -2 and 2")] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2, description="between -2 and 2")] = 0.0
    repetition_penalty: Positive = 1.0
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    exact: bool = False
    cache_salt: str = ""

    @property
    def penalties(self) -> tuple[float, float, float]:
        """The penalties of repetition, frequency and presence."""
        return self.repetition_penalty, self.frequency_penalty, self.presence_penalty

    @property
    def has_penalties(self) -> bool:
        return self.penalties != (1, 0, 0)

    def with_seed(self) -> Self:
        """Returns the same parameters, with a random seed if they have none."""
        return self if self.seed is not None else replace(self, seed=random.getrandbits(31))

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
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must have at least one token; null allows all")
        if not all(word.strip() for word in self.bad_words):
            raise ValueError("bad_words must be texts that are not empty or white space alone")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise ValueError(f"{name} must be between 0 and {MAX_LOGPROBS}, got {value}")


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability (natural, of the unmodified distribution) and the most likely alternatives.

    top: (token id, log-probability) pairs by falling probability; the token itself is always among them.
    rank: number of tokens that are at least as likely, with itself; None for tokens of an answer.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


class MoEUsage(make_dataclass("Counts", [(name, int, 0) for name in names(USAGE)])):
    """Counts of a request's assignments of tokens to experts over all layers, and of what lossy techniques
    did to them: one number for each name of ``USAGE``."""


@dataclass(frozen=True)
class Output:
    """One increment of a request's answer; the last one carries ``finish_reason``.

    text: text that became certain; it never holds half a character nor the beginning of a stop string.
    thoughts: the same for what the model writes apart from its answer: its other channels, or its thoughts.
    prompt_logprobs: one entry per prompt token, None for the first; they are sent once, with the first
        increment.
    error: one-line cause if ``finish_reason`` is "error".
    is_invalid: whether the request itself is that cause, so that sending it again cannot help.
    moe: counts that are sent with the last increment, if anything lossy is configured.
    num_thought_tokens: number of the tokens that belong to thoughts.
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
    is_invalid: bool = False
    moe: MoEUsage | None = None
    num_thought_tokens: int = 0


@dataclass(frozen=True)
class TokenLimits:
    """Limits on the tokens of an answer, in a form that a step takes.

    allowed_W: bit mask of the tokens that may be sampled at all; None allows all.
    bad_sequences: sequences of two or more tokens that the answer may not have.
    """

    allowed_W: np.ndarray | None = None
    bad_sequences: tuple[tuple[int, ...], ...] = ()


class Constraint(Protocol):
    """The tokens that one answer may have: a grammar, and the answer's current state in it.

    is_open: whether most tokens may come next, as in free text. The next token is then drawn without a mask,
        and it is drawn again with one if it turns out not to be allowed.
    allowed: method that returns uint32 ``[ceil(vocabulary / 32)]``; bit t % 32 of word t // 32 says whether
        token t may come next. At least one token may; the end-of-text token may if the answer may end here.
    is_allowed: method that says the same of one token. It does not change the state.
    accept: method that advances the state by the sampled token.

    All are used on the engine's thread. The methods raise ValueError with one line if they fail.
    """

    @property
    def is_open(self) -> bool: ...
    def allowed(self) -> np.ndarray: ...
    def is_allowed(self, token_id: int) -> bool: ...
    def accept(self, token_id: int) -> None: ...


@dataclass(eq=False)
class Request:
    """A request in the engine. Times are ``time.monotonic`` seconds.

    id: id of the request.
    prompt_token_ids: tokens of the prompt.
    params: sampling parameters.
    emit: function that is called from the engine's thread with every increment; it must not block.
    arrival_time: time at which the engine got the request.
    constraint: grammar of the answer; None allows every token.
    limits: limits on its tokens that its parameters set, which the engine prepares; None before that.
    markup: marks by which the answer's text is divided.
    token_ids: generated tokens that the host has seen, and that the grammar allows.
    state: state that the scheduler keeps of the request.
    start_time: time of its first admission; None while it waits.
    first_token_time: time of its first token; None before it.
    moe: assignments of its tokens that lossy techniques changed.
    num_cached_tokens: prompt tokens that were found in cached pages when the request was first admitted.
    caution: how long its masks last after its grammar has refused a token.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    emit: Callable[[Output], None]
    arrival_time: float
    constraint: Constraint | None = None
    limits: TokenLimits | None = None
    markup: Markup = PLAIN
    token_ids: list[int] = field(default_factory=list)
    state: "RequestState" = field(default_factory=lambda: RequestState())
    start_time: float | None = None
    first_token_time: float | None = None
    moe: MoEUsage = field(default_factory=MoEUsage)
    num_cached_tokens: int = 0
    caution: Caution = field(default_factory=Caution)

    @property
    def length(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def needs_mask(self) -> bool:
        """Whether the next token, after those in flight, is drawn with a mask. The host must then have seen
        those in flight."""
        if self.constraint is None:
            return False
        num_in_flight = self.state.num_in_flight - self.state.num_stale
        return self.caution.num_masked > num_in_flight or not self.constraint.is_open

    def note_refusal(self) -> None:
        """Notes that the grammar has refused a token, so that the next one is drawn with a mask."""
        if self.constraint is not None and self.constraint.is_open:
            self.caution.refuse()

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt_token_ids, *self.token_ids]

    def part(self, start: int, count: int) -> list[int]:
        """Returns the request's tokens from position ``start`` on: ``count``, or fewer if fewer are known."""
        n = len(self.prompt_token_ids)
        generated = self.token_ids[max(start - n, 0) : max(start + count - n, 0)]
        return [*self.prompt_token_ids[start : start + count], *generated]


@dataclass
class RequestState:
    """A request's state in the scheduler. Token counts include those of steps that were already started.

    arrival: order of arrival.
    times_overtaken: number of later requests that were admitted first.
    rank: rank on which the request runs; -1 while it waits.
    seat: number that no other running request has, below the maximum of running requests.
    block_table: KV pages that the request holds while it runs.
    page_names: names of its pages; None if they are not shared.
    num_named_pages: number of its full pages that the rank already knows by name.
    num_cached_tokens: tokens found in cached pages at admission.
    num_prefill_tokens: tokens to prefill.
    num_computed_tokens: tokens whose keys and values are in the pages.
    num_in_flight: tokens that the device has sampled and the host has not seen.
    num_stale: those of them that were drawn after a token that the grammar has refused.
    is_redraw: whether the next run computes the last known token again, because the token drawn after it was
        refused.
    num_counted_tokens: tokens that the counts of its seat hold, for penalties; 0 if these are another
        request's.
    is_ended: whether nothing of the request is wanted any more.
    """

    arrival: int = -1
    times_overtaken: int = 0
    rank: int = -1
    seat: int = -1
    block_table: list[int] = field(default_factory=list)
    page_names: PageNames | None = None
    num_named_pages: int = 0
    num_cached_tokens: int = 0
    num_prefill_tokens: int = 0
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    num_stale: int = 0
    is_redraw: bool = False
    num_counted_tokens: int = 0
    is_ended: bool = False


class QueueFull(Exception):
    """The queue holds as many requests as it may; try again later."""


class EngineDead(Exception):
    """The engine's loop has ended; no request can be served."""
