"""What the routes answer, as structs: the answers are made of them, and the OpenAPI document describes them.

The order of a struct's fields is the order of the keys in the answer. A field that is UNSET is left out of
the answer; null is a value that is always sent. The docstrings are part of the document.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, defstruct

from jmoe.config.counters import USAGE, names
from jmoe.server.request.schema import Count, Strict

FinishReason = Literal["stop", "length", "tool_calls"]


class MoEUse(defstruct("Counts", [(name, Count) for name in names(USAGE)], bases=(Strict,))):
    """What lossy techniques did to the answers' assignments of tokens to experts."""


class PromptDetails(Strict):
    """cached_tokens: those of the prompts whose keys and values were found, not computed."""

    cached_tokens: Count


class Usage(Strict):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails
    moe: MoEUse | UnsetType = UNSET


class CompletionLogprobs(Strict):
    """One entry a token; the first token of an echoed prompt has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


# The last three fields of each choice. finish_reason: null while a stream's choice goes on. stop_reason: the
# stop string or id that ended the choice. token_ids: sent with return_token_ids.
class CompletionChoice(Strict, kw_only=True):
    """reasoning_content: what a model that answers in channels said in others than the final one."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    reasoning_content: str | UnsetType = UNSET
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[Count] | UnsetType = UNSET


class Head(Strict, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(Head, kw_only=True):
    """The answer of /v1/completions, and with some of the text each chunk of its stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(Strict):
    """bytes: the token's own; null where the model has no tokenizer."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Meta(ge=0, le=255)]] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Strict):
    content: list[ChatLogprob]
    refusal: None


class FunctionCall(Strict):
    """arguments: JSON text of an object, whole where the answer was not cut off."""

    name: str
    arguments: str


class Call(Strict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(Strict, kw_only=True):
    """content: null where the answer is a call. reasoning_content: see ``CompletionChoice``."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class ChatChoice(Strict, kw_only=True):
    index: Count
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[Count] | UnsetType = UNSET


class ChatCompletion(Head, kw_only=True):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class FunctionPiece(Strict, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class CallPiece(Strict, kw_only=True):
    """The first piece of a call has its id, type and name; the arguments' pieces add up."""

    index: Count
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionPiece


class Delta(Strict, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallPiece] | UnsetType = UNSET


class ChatPiece(Strict, kw_only=True):
    index: Count
    delta: Delta
    logprobs: ChatLogprobs | UnsetType | None = UNSET
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[Count] | UnsetType = UNSET


class ChatCompletionChunk(Head, kw_only=True):
    """One event of a streamed chat answer. usage: where requested, null but in the last one before [DONE]."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]
    usage: Usage | UnsetType | None = UNSET


class Tokens(Strict, kw_only=True):
    """token_strs: with return_token_strs."""

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] | UnsetType = UNSET


class Text(Strict):
    prompt: str


class Status(Strict):
    status: Literal["ok"]


class Version(Strict):
    version: str


class Model(Strict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: Count


class Models(Strict):
    object: Literal["list"]
    data: list[Model]


class PhaseStats(Struct):
    """per_layer: one object of numbers a MoE layer."""

    steps: Count
    per_layer: list[dict[str, Any]]


class MoEStats(Struct):
    model: dict[str, Any]
    prefill: PhaseStats
    decode: PhaseStats
