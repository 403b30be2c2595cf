"""Request bodies as typed structs. ``null`` means the default; an unknown field is refused by name.

Fields that clients send and this server cannot honour are declared too, so that their neutral values pass
and any other value is answered with a 400 that names the field (``NEUTRAL``).
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_CHOICES = 1024  # answers one HTTP request may ask for: prompts x n, bounded before anything is allocated

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
StopTexts = Annotated[list[StopText], Meta(max_length=4)]


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON object without other fields than its own."""


class StreamOptions(Strict, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class MoEOptions(Strict, kw_only=True):
    """exact: opt out of every lossy technique: the routing is the one of a lossless engine."""

    exact: bool | None = None


class GenerationRequest(Strict, kw_only=True):
    """What completions and chat completions share."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | StopTexts | None = None
    stop_token_ids: Annotated[list[Count], Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    return_token_ids: bool | None = None
    moe: MoEOptions | None = None
    # Accepted and without effect here: they concern accounts, storage and billing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    # Neutral values only.
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    response_format: Any = None
    chat_template: Any = None


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Alternatives | None = None
    best_of: Positive | None = None
    suffix: str | None = None


class Message(Strict, kw_only=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None


class ChatRequest(GenerationRequest, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    chat_template_kwargs: Any = None


class TokenizeRequest(Strict, kw_only=True):
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict, kw_only=True):
    tokens: list[Count]
    model: str | None = None


# Field -> the values besides null that ask for nothing, as vLLM's and OpenAI's clients send them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": (),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": (),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "tool_calls": ([],),
    "include_obfuscation": (False,),
}
