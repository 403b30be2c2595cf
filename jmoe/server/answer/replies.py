"""The structs of the routes' answers: the answers are made of them, and the OpenAPI document describes them.

The order of a struct's fields is the order of the keys in the answer. A field that is UNSET is left out of
the answer; null is a value that is always sent. The docstrings are part of the document.
"""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType, defstruct

from jmoe.config.counters import USAGE, names
from jmoe.server.request.fields.base import Count, Strict

FinishReason = Literal["stop", "length", "tool_calls"]


class MoEUse(defstruct("Counts", [(name, Count) for name in names(USAGE)], bases=(Strict,))):
    """What lossy techniques did to the answers' assignments of tokens to experts."""


class PromptDetails(Strict):
    """cached_tokens: number of prompt tokens in the prefix cache, whose keys and values were not computed
    again."""

    cached_tokens: Count


class AnswerDetails(Strict):
    """reasoning_tokens: number of answer tokens that are thoughts."""

    reasoning_tokens: Count


class Usage(Strict):
    """The tokens of a request.

    prompt_tokens: number of tokens of all prompts.
    completion_tokens: number of tokens of all answers.
    total_tokens: sum of both.
    prompt_tokens_details: prompt tokens in the prefix cache.
    completion_tokens_details: answer tokens that are thoughts; absent if there are none.
    moe: assignments, and those that lossy techniques changed; absent without such techniques.
    """

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails
    completion_tokens_details: AnswerDetails | UnsetType = UNSET
    moe: MoEUse | UnsetType = UNSET


class CompletionLogprobs(Strict):
    """One entry per token; the first token of an echoed prompt has null.

    tokens: text of each token.
    token_logprobs: log-probability of each token.
    top_logprobs: likeliest tokens at each position, with their log-probabilities.
    text_offset: position of each token in the text, in characters.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class PromptLogprob(Strict):
    """logprob: log-probability of the token.
    rank: number of tokens that are at least as likely, with itself.
    decoded_token: text of the token.
    """

    logprob: float
    rank: Count | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(Strict, kw_only=True):
    """One answer, or in a stream a piece of it.

    index: number of the choice.
    text: text of the answer, or of the piece.
    logprobs: log-probabilities; null unless requested.
    prompt_logprobs: log-probabilities of the prompt by token id, null for its first token; absent unless
        requested.
    reasoning_content: text of all channels except the final one; absent for models without channels.
    finish_reason: reason for the end; null until the choice ends.
    stop_reason: stop string or token id that ended the choice; absent if none did.
    token_ids: ids of the tokens; absent unless requested.
    """

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[Count] | UnsetType = UNSET


class Head(Strict, kw_only=True):
    """The fields that all answers begin with.

    id: id of the request.
    created: time of the request, in seconds since 1970.
    model: served model name.
    system_fingerprint: version of the server.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(Head, kw_only=True):
    """The answer of /v1/completions, and each chunk of its stream.

    object: type of the answer.
    choices: one per prompt and answer.
    usage: null except in the last chunk of a stream; absent from a stream unless requested.
    """

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(Strict):
    """token: text of the token.
    logprob: log-probability of the token.
    bytes: bytes of the token; null if the model has no tokenizer.
    """

    token: str
    logprob: float
    bytes: list[Annotated[int, Meta(ge=0, le=255)]] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Strict):
    """content: one entry per token of the answer.
    refusal: always null.
    """

    content: list[ChatLogprob]
    refusal: None


class FunctionCall(Strict):
    """name: name of the function.
    arguments: JSON text of an object; cut if the answer was cut.
    """

    name: str
    arguments: str


class Call(Strict):
    """id: id of the call, nine letters and digits.
    type: type of the call.
    function: function with its arguments.
    """

    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(Strict, kw_only=True):
    """The message of a chat answer.

    role: role of the message.
    content: text; null if the answer calls a function.
    refusal: always null.
    reasoning_content: text of all channels except the final one; absent for models without channels.
    tool_calls: calls of functions; absent if there are none.
    """

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class ChatChoice(Strict, kw_only=True):
    """One answer of a chat.

    index: number of the choice.
    message: text or call of the answer.
    logprobs: log-probabilities; null unless requested.
    finish_reason: reason for the end.
    stop_reason: stop string or token id that ended the choice; absent if none did.
    token_ids: ids of the tokens; absent unless requested.
    """

    index: Count
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[Count] | UnsetType = UNSET


class ChatCompletion(Head, kw_only=True):
    """The whole answer of a chat.

    object: type of the answer.
    choices: one per answer.
    usage: tokens of the request.
    prompt_logprobs: log-probabilities of the prompt by token id, null for its first token; absent unless
        requested.
    """

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FunctionPiece(Strict, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class CallPiece(Strict, kw_only=True):
    """A piece of a call. The first piece has the id, the type and the name.

    index: number of the call.
    id: id of the call; absent after the first piece.
    type: type of the call; absent after the first piece.
    function: name, in the first piece only, and a piece of the arguments, which add up.
    """

    index: Count
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionPiece


class Delta(Strict, kw_only=True):
    """A piece of a chat answer.

    role: role of the message; absent after the first chunk.
    content: piece of the text; null if the answer calls a function.
    reasoning_content: piece of the text of all channels except the final one.
    tool_calls: pieces of calls.
    """

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallPiece] | UnsetType = UNSET


class ChatPiece(Strict, kw_only=True):
    """One answer of a chat in a chunk.

    index: number of the choice.
    delta: piece of the answer.
    logprobs: log-probabilities of the piece's tokens; null or absent unless requested.
    finish_reason: reason for the end; null until the choice ends.
    stop_reason: stop string or token id that ended the choice; absent if none did.
    token_ids: ids of the piece's tokens; absent unless requested.
    """

    index: Count
    delta: Delta
    logprobs: ChatLogprobs | UnsetType | None = UNSET
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[Count] | UnsetType = UNSET


class ChatCompletionChunk(Head, kw_only=True):
    """One event of a streamed chat answer.

    object: type of the event.
    choices: one per answer of which the chunk has a piece.
    usage: null except in the last chunk; absent unless requested.
    """

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]
    usage: Usage | UnsetType | None = UNSET
