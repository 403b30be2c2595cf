"""The reports of an engine about itself and its model, as plain data, and their receiver."""

from dataclasses import dataclass
from typing import Protocol

from jmoe.engine.request import Request
from jmoe.engine.text.codec import TextCodec


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that stay the same while its engine lives.

    codec: the model's text codec; None = the model has no tokenizer and prompts are token ids.
    max_model_len: maximum number of tokens of a prompt and its answer together.
    vocab_size: size of the vocabulary, which all token ids are below.
    end_ids: the model's end-of-text tokens.
    """

    codec: TextCodec | None
    max_model_len: int
    vocab_size: int
    end_ids: frozenset[int]


@dataclass(frozen=True)
class EngineSnapshot:
    """The engine at one moment. The last five fields are counted since the start.

    kv_usage: share of KV pages in use, 0 to 1.
    compilations_after_warmup: compilations after the warm-up.
    preemptions: times that a request lost its pages to an older one.
    prefix_queries: prompt tokens that were looked up in cached pages.
    prefix_hits: prompt tokens that were found there.
    grammar_redraws: tokens that a grammar refused and that were drawn again.
    """

    num_running: int
    num_waiting: int
    kv_usage: float
    is_alive: bool
    compilations_after_warmup: int
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    grammar_redraws: int = 0


@dataclass(frozen=True)
class StepReport:
    """Size and duration of one step.

    prompt_tokens: prompt tokens in the step.
    decode_tokens: decoded tokens in the step.
    seconds: time from its start to its results on the host.
    host_seconds: part of that time in which the host worked on the step.
    """

    prompt_tokens: int
    decode_tokens: int
    seconds: float
    host_seconds: float


class Listener(Protocol):
    """The receiver of every token, step and finished request. The engine calls it on its own thread."""

    def token(self, request: Request, now: float) -> None: ...
    def stepped(self, report: StepReport) -> None: ...
    def finished(self, request: Request, reason: str) -> None: ...
