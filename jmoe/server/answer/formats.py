"""The common parts of the formats of answers: their protocol, and the fields that every choice may have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import UNSET, Struct, UnsetType

from jmoe.engine.request import Output
from jmoe.engine.text.codec import TextCodec
from jmoe.server.answer.logprobs import prompt_logprobs
from jmoe.server.answer.replies import FinishReason, Head, PromptLogprobs, Usage
from jmoe.server.errors import ApiError

Outputs = Sequence[Output]  # increments of one choice, in their order
CountTokens = Callable[[], Usage]


@dataclass(frozen=True)
class ChoiceFields:
    """The contents that a request wants in its choices.

    codec: text codec of the model; None = the model has no tokenizer.
    n: number of choices for each prompt.
    alternatives: number of alternatives for each token; None = no log-probabilities.
    has_token_ids: whether a choice has the field ``token_ids``, as vLLM writes it; a model without a
        tokenizer can answer only with this field.
    prompt_alternatives: number of alternatives for each token of the prompt; None = no log-probabilities.
    shows_special: whether the text has special tokens.
    """

    codec: TextCodec | None
    n: int
    alternatives: int | None
    has_token_ids: bool
    prompt_alternatives: int | None = None
    shows_special: bool = False


@dataclass(frozen=True)
class StreamEvent:
    """One server-sent event.

    data: JSON object of the event.
    name: name of the event; None = it has only data.
    """

    data: Struct
    name: str | None = None


class AnswerFormat(Protocol):
    """The way in which an answer is written, whole or as a stream of events.

    end: bytes after the last event of every stream.
    opening: returns the events before any token.
    increment: returns the events of one increment of choice ``index``.
    closing: returns the events after the last increment of all choices.
    failure: returns the events after which a stream ends early.
    whole: returns the answer made of all increments of each choice.

    ``usage`` returns the token counts so far.
    """

    end: bytes

    def opening(self, head: Head, usage: CountTokens) -> Sequence[StreamEvent]: ...
    def increment(
        self, head: Head, index: int, output: Output, usage: CountTokens
    ) -> Sequence[StreamEvent]: ...
    def closing(self, head: Head, usage: CountTokens) -> Sequence[StreamEvent]: ...
    def failure(self, head: Head, error: ApiError, usage: CountTokens) -> Sequence[StreamEvent]: ...
    def whole(self, head: Head, choices: Sequence[Outputs], usage: Usage) -> Struct: ...


def answer_text(outputs: Outputs) -> str:
    return "".join(output.text for output in outputs)


def prompt_scores(fields: ChoiceFields, outputs: Outputs) -> PromptLogprobs | UnsetType:
    """Returns the log-probabilities of the choice's prompt; UNSET if they are not requested."""
    if fields.prompt_alternatives is None:
        return UNSET
    return prompt_logprobs(outputs[0].prompt_logprobs or (), fields.codec, fields.prompt_alternatives)


def answer_thoughts(outputs: Outputs) -> str | UnsetType:
    """Returns what a model thought before it answered; UNSET if it did not think."""
    return "".join(output.thoughts for output in outputs) or UNSET


def finish_reason(outputs: Outputs) -> FinishReason | None:
    reason = outputs[-1].finish_reason
    assert reason != "error" and reason != "abort"  # the generation raises for them
    return reason


def stop_reason(outputs: Outputs) -> str | int | UnsetType:
    """Returns the stop string or id that ended the choice, or UNSET: absent optional fields are left out, as
    OpenAI does."""
    reason = outputs[-1].stop_reason
    return UNSET if reason is None else reason


def answer_ids(outputs: Outputs) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
