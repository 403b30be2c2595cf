"""The checks of a decoded body: every field is supported, and no two contradict each other.

``check_chat`` also decides once how the answer uses tools and which grammar it follows; what comes after it
reads the decision.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from jmoe.server.errors import invalid, unsupported
from jmoe.server.request.bounds import MAX_TOOL_CHARACTERS, exceeds
from jmoe.server.request.conversation.final_message import check_final_message
from jmoe.server.request.conversation.results import in_order
from jmoe.server.request.fields.base import neutral
from jmoe.server.request.fields.chat import Message
from jmoe.server.request.schema import ChatRequest, CompletionRequest, GenerationRequest
from jmoe.server.request.structured import GrammarRequest, requested_grammar
from jmoe.server.request.tools import ToolSupport, ToolUse, tool_use
from jmoe.server.template.chat_template import RESERVED

AT_LEAST = "max_tokens must be at least 1, or -1 for the rest of the context"


@dataclass(frozen=True)
class CheckedChat:
    """A chat request and what its checks decided.

    body: request body.
    tools: how the answer uses tools; None if it is text.
    grammar: grammar that the answer must follow; None if it is free.
    """

    body: ChatRequest
    tools: ToolUse | None
    grammar: GrammarRequest | None


def check_supported(body: msgspec.Struct, prefix: str = "") -> None:
    """Refuses a field whose value requests something that the server cannot do."""
    for name, values in neutral(type(body)).items():
        value: Any = getattr(body, name)
        if value is not None and not any(_same(value, v) for v in values):
            only = " or ".join(["null", *(msgspec.json.encode(v).decode() for v in values)])
            raise unsupported(prefix + name, f"{prefix}{name} is not supported here, only {only} is accepted")


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def check_generation(body: GenerationRequest) -> None:
    """Refuses unsupported fields and combinations that contradict themselves."""
    check_supported(body)
    if body.best_of not in (None, 1, body.n):  # best_of = n leaves out no answer
        raise unsupported("best_of", "best_of is not supported here, only null or 1 or n is accepted")
    _check_sampling(body)
    options = body.stream_options
    if options is not None:
        check_supported(options, "stream_options.")
        if not body.stream and (options.include_usage or options.continuous_usage_stats):
            raise invalid("stream_options is only allowed with stream: true", "stream_options")


def _check_sampling(body: GenerationRequest) -> None:
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs is not available with stream: true", "prompt_logprobs")
    factors = {body.repetition_penalty, body.repeat_penalty} - {None}
    if len(factors) > 1:
        raise invalid("repetition_penalty and repeat_penalty differ; give one", "repeat_penalty")
    if body.repeat_penalty not in (None, 1) and body.repeat_last_n not in (None, -1):
        raise unsupported(
            "repeat_last_n", "repeat_last_n is not supported here: repeat_penalty concerns all tokens, as -1"
        )


def check_completion(body: CompletionRequest) -> None:
    check_generation(body)
    if body.max_tokens == 0 and not body.echo:
        raise invalid(f"{AT_LEAST}; 0 only with echo, to score a prompt", "max_tokens")


def check_chat(body: ChatRequest, support: ToolSupport) -> CheckedChat:
    """Returns the checked request.

    support: how the model's answers call functions.
    """
    if body.truncate_prompt_tokens is not None:
        raise unsupported(
            "truncate_prompt_tokens",
            "truncate_prompt_tokens is only for /v1/completions: it would cut the chat's template in two",
        )
    check_generation(body)
    check_messages(body.messages)
    check_final_message(body)
    functions = [tool.function for tool in body.tools or ()]
    if exceeds([[f.name, f.description, f.parameters] for f in functions], MAX_TOOL_CHARACTERS):
        raise invalid(f"tools hold more than {MAX_TOOL_CHARACTERS} characters", "tools")
    tools = tool_use(body, support)
    if tools is not None and body.skip_special_tokens is False:
        raise invalid(
            "skip_special_tokens: false is not available with tools, whose calls are read from the text",
            "skip_special_tokens",
        )
    for name in body.chat_template_kwargs or ():
        if name in RESERVED:
            raise invalid(f"{name!r} is not a variable that a request may set", "chat_template_kwargs")
    for name in ("max_tokens", "max_completion_tokens"):
        if getattr(body, name) == 0:
            raise invalid(AT_LEAST.replace("max_tokens", name), name)
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs is only allowed with logprobs: true", "top_logprobs")
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise invalid("max_tokens and max_completion_tokens differ; give one", "max_completion_tokens")
    around = None if support.dialect is None else support.dialect.around
    return CheckedChat(body, tools, requested_grammar(body, tools, around))


def check_messages(messages: list[Message]) -> None:
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        check_supported(message, f"{where}.")
        if message.tool_calls and message.role != "assistant":
            raise invalid(f"{where}.tool_calls is only for the assistant", f"{where}.tool_calls")
        if (message.tool_call_id is None) == (message.role == "tool"):
            raise invalid(
                f"{where}.tool_call_id belongs to each tool message and to no other", f"{where}.tool_call_id"
            )
    in_order(messages)
