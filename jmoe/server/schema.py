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
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Scalar = str | int | float | bool | None
GrammarText = Annotated[str, Meta(min_length=1, max_length=64 * 1024)]


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON object without other fields than its own."""


class StreamOptions(Strict, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class MoEOptions(Strict, kw_only=True):
    """exact: opt out of every lossy technique: the routing is the one of a lossless engine."""

    exact: bool | None = None


class TextFormat(Strict, tag_field="type", tag="text"):
    """No constraint."""


class JsonObjectFormat(Strict, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(Strict, kw_only=True):
    """strict: accepted; the schema is always followed to the letter."""

    name: Name
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Strict, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


class StructuredOutputs(Strict, kw_only=True):
    """Exactly one: a JSON schema (or one as text), what the whole answer matches, one of several answers, a
    grammar in llguidance's Lark dialect, any JSON object."""

    json: dict[str, Any] | GrammarText | None = None
    regex: GrammarText | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None


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
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=256)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    add_special_tokens: bool | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    moe: MoEOptions | None = None
    # Accepted and without effect here: they concern accounts, storage and billing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Neutral values only.
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    priority: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: Any = None
    return_routed_experts: bool | None = None
    chat_template: Any = None


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Alternatives | None = None
    best_of: Positive | None = None
    suffix: str | None = None


class Sent(Strict, kw_only=True, dict=True):
    """A JSON object that the model's template gets as it was sent: with its own keys in their order.

    ``body.decode`` sets ``sent``.
    """

    @property
    def sent(self) -> dict[str, Any]:
        return self.__dict__["sent"]


class CalledFunction(Strict, kw_only=True):
    """arguments: JSON text, of an object unless the answer was cut."""

    name: str
    arguments: str | dict[str, Any]


class ToolCall(Strict, kw_only=True):
    """index, extra_content: what a stream's deltas hold, for who sends the joined ones back."""

    id: str
    function: CalledFunction
    type: Literal["function"] | None = None
    index: int | None = None
    extra_content: Any = None


class Message(Sent, kw_only=True):
    """reasoning_content, reasoning, thinking: what an assistant thought before it answered."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None
    annotations: Any = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None


class Function(Strict, kw_only=True):
    """parameters: the JSON schema of an object; none = no arguments. strict: accepted; always followed."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Sent, kw_only=True):
    type: Literal["function"]
    function: Function


class FunctionName(Strict, kw_only=True):
    name: str


class NamedTool(Strict, kw_only=True):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(GenerationRequest, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: (
        Annotated[dict[str, str | int | float | bool | None], Meta(max_length=16)] | None
    ) = None
    # Neutral values only.
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


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
    "priority": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "return_routed_experts": (False,),
    "chat_template": (),
    "best_of": (1,),
    "suffix": ("",),
    "functions": (),
    "function_call": ("none",),
    "annotations": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_obfuscation": (False,),
}
