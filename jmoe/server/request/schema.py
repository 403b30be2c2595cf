"""Request bodies as typed structs. A null means the default; an unknown field is refused by name.

Fields that clients send and this server cannot honour are declared too (``only``), so that the values that
request nothing pass and any other value is answered with a 400 that names the field.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta

from jmoe.server.request.bounds import MAX_MESSAGES
from jmoe.server.request.fields.base import Absent, Count, Name, Off, On, One, Strict, Unlimited, Zero, only
from jmoe.server.request.fields.chat import AllowedTools, Message, NamedTool, ThinkingSwitch, Tool

MAX_CHOICES = 1024  # answers one HTTP request may ask for: prompts x n, bounded before anything is allocated

Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
Limit = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
StopText = Annotated[str, Meta(max_length=1024)]
StopTexts = Annotated[list[Annotated[StopText, Meta(min_length=1)]], Meta(max_length=16)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
GrammarText = Annotated[str, Meta(min_length=1, max_length=64 * 1024)]


class StreamOptions(Strict, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Off = None


class MoEOptions(Strict, kw_only=True):
    """exact: whether the request opts out of every lossy technique; it is then routed without any."""

    exact: bool | None = None


class TextFormat(Strict, tag_field="type", tag="text"):
    """No constraint."""


class JsonObjectFormat(Strict, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(Strict, kw_only=True):
    """strict: accepted; the schema is always followed exactly."""

    name: Name
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Strict, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


class StructuredOutputs(Strict, kw_only=True):
    """The form of the whole answer; exactly one field is set.

    json: JSON schema, or its JSON text.
    regex: regular expression that the answer matches.
    choice: texts of which the answer is one.
    grammar: Lark grammar in llguidance's dialect.
    json_object: whether the answer is any JSON object.
    """

    json: dict[str, Any] | GrammarText | None = None
    regex: GrammarText | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None


class GenerationRequest(Strict, kw_only=True):
    """The fields of completions and chat completions that are not OpenAI's, or differ:

    seed: seed of the draws; answer i of a prompt uses seed + i.
    cache_salt: cached prompts are shared only between requests of the same salt.
    add_special_tokens: whether text gets the tokenizer's special tokens.
    structured_outputs: form of the whole answer, in vLLM's fields.
    moe: use of lossy techniques.
    """

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
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
    best_of: Positive | None = None
    # Accepted and without effect here: they concern accounts, storage, billing and other servers' caches.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    session_id: str | None = None
    cache_prompt: bool | None = None
    # Neutral values only: OpenAI's fields, then vLLM's, SGLang's and llama-server's.
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    repetition_penalty: One = None
    length_penalty: One = None
    use_beam_search: Off = None
    early_stopping: Off = None
    priority: Zero = None
    skip_special_tokens: On = None
    spaces_between_special_tokens: On = None
    include_stop_str_in_output: Off = None
    truncate_prompt_tokens: Absent = None
    truncation_side: Annotated[Any, only("left", "right")] = None
    bad_words: Annotated[Any, only([])] = None
    thinking_token_budget: Unlimited = None
    stream_interval: One = None
    watermarking: Off = None
    vllm_xargs: Annotated[Any, only({})] = None
    kv_transfer_params: Annotated[Any, only({})] = None
    return_routed_experts: Off = None
    routed_experts_prompt_start: Zero = None
    return_tokens_as_token_ids: Off = None
    return_token_offsets: Off = None
    return_prompt_text: Off = None
    return_mm_kwargs: On = None
    return_hidden_states: Off = None
    no_stop_trim: Off = None
    chat_template: Absent = None
    n_predict: Unlimited = None
    n_probs: Zero = None
    n_keep: Zero = None
    min_keep: Zero = None
    id_slot: Unlimited = None
    repeat_penalty: One = None
    typical_p: One = None
    typ_p: One = None
    tfs_z: One = None
    top_a: Zero = None
    top_n_sigma: Annotated[Any, only(-1, 0)] = None
    mirostat: Zero = None
    dynatemp_range: Zero = None
    xtc_probability: Zero = None
    dry_multiplier: Zero = None
    backend_sampling: Off = None
    timings_per_token: Off = None
    return_progress: Off = None
    # Of any value: they shape what the fields above leave switched off.
    repeat_last_n: Any = None
    mirostat_tau: Any = None
    mirostat_eta: Any = None
    dynatemp_exponent: Any = None
    xtc_threshold: Any = None
    dry_base: Any = None
    dry_allowed_length: Any = None
    dry_penalty_last_n: Any = None
    dry_sequence_breakers: Any = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """prompt: text, texts, token ids or lists of token ids."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Limit | None = None
    echo: bool | None = None
    logprobs: Alternatives | None = None
    # Neutral values only.
    suffix: Annotated[Any, only("")] = None


class ChatRequest(GenerationRequest, kw_only=True):
    """parallel_tool_calls: whether the answer may have several calls.
    chat_template_kwargs: variables for the model's chat template.
    reasoning_effort: how much the model thinks, if its template can tell it.
    enable_thinking, thinking: whether the model thinks, if its template can tell it.
    add_generation_prompt: whether the beginning of an assistant's message follows the last message.
    continue_final_message: whether the answer continues the text of the last message.
    """

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: (
        Annotated[dict[str, str | int | float | bool | None], Meta(max_length=16)] | None
    ) = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    enable_thinking: bool | None = None
    thinking: bool | ThinkingSwitch | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # Neutral values only: OpenAI's fields, then vLLM's, SGLang's and llama-server's.
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Absent = None
    prediction: Absent = None
    moderation: Absent = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Absent = None
    echo: Off = None
    documents: Annotated[Any, only([])] = None
    include_reasoning: On = None
    media_io_kwargs: Annotated[Any, only({})] = None
    mm_processor_kwargs: Annotated[Any, only({})] = None
    separate_reasoning: On = None
    stream_reasoning: On = None
    reasoning_format: Annotated[Any, only("none", "auto")] = None


class TokenizeRequest(Strict, kw_only=True):
    """A body of /tokenize. It has either a prompt or messages."""

    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict, kw_only=True):
    tokens: list[Count]
    model: str | None = None
