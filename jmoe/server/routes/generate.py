"""POST /v1/completions and /v1/chat/completions.

Both go the same way: the body is read and checked, its prompts become tokens, the engine generates, and the
format writes the answer.
"""

from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from jmoe.engine.request import SamplingParams
from jmoe.server.answer.calls import ToolFormat
from jmoe.server.answer.chats import ChatFormat
from jmoe.server.answer.chunks import Chunks
from jmoe.server.answer.completions import CompletionFormat
from jmoe.server.answer.delivery import Answer, EventStream, UsageCounter, stream_events, whole_answer
from jmoe.server.answer.formats import AnswerFormat, ChoiceFields
from jmoe.server.request.checks import check_chat, check_completion
from jmoe.server.request.params import chat_params, completion_params, fan_out
from jmoe.server.request.prepared import PreparedRequest
from jmoe.server.request.prompts import TextEncoder, chat_prompt
from jmoe.server.request.schema import ChatRequest, CompletionRequest, GenerationRequest
from jmoe.server.request.structured import requested_grammar
from jmoe.server.request.tools import ToolUse
from jmoe.server.request.truncation import cut_prompts, truncation
from jmoe.server.service import Service


async def create_completion(service: Service, request: Request) -> Response:
    prepared, form = await service.read(request, partial(_completion, service))
    return await answered(service, request, prepared, form, "cmpl-")


async def create_chat_completion(service: Service, request: Request) -> Response:
    prepared, form = await service.read(request, partial(_chat, service))
    return await answered(service, request, prepared, form, "chatcmpl-")


def _completion(service: Service, raw: bytes) -> tuple[PreparedRequest, AnswerFormat]:
    """Does all work whose time grows with the body."""
    body = service.decode(raw, CompletionRequest)
    check_completion(body)
    params, n = completion_params(body, service.facts.vocab_size), body.n or 1
    grammar = requested_grammar(body)
    encoder = _encoder(service, adds_special=body.add_special_tokens is not False)
    prompts = cut_prompts(body, encoder, truncation(body, params, service.facts.max_model_len))
    fields = _fields(service, body, params)
    form = Chunks(CompletionFormat(fields, prompts, echo=bool(body.echo)), body.stream_options)
    return PreparedRequest(body, prompts, fan_out(params, len(prompts), n), grammar, "prompt"), form


def _chat(service: Service, raw: bytes) -> tuple[PreparedRequest, AnswerFormat]:
    """Does all work whose time grows with the body."""
    prepared, tools = prepared_chat(service, service.decode(raw, ChatRequest))
    fields = _fields(service, prepared.body, prepared.params[0])
    form = ChatFormat(fields) if tools is None else ToolFormat(fields, tools)
    return prepared, Chunks(form, prepared.body.stream_options)


def prepared_chat(
    service: Service, body: ChatRequest, *, is_clamped: bool = False
) -> tuple[PreparedRequest, ToolUse | None]:
    """Returns a chat as the engine takes it, and how its answer uses tools.

    is_clamped: whether an answer longer than the rest of the context is allowed to ask for only that rest.
    """
    chat = check_chat(body, service.chat.tools)
    body = chat.body
    params, n = chat_params(chat, service.facts.vocab_size, service.turn_ends), body.n or 1
    encoder = _encoder(service, adds_special=bool(body.add_special_tokens))
    prompt = chat_prompt(chat, service.chat, encoder)
    if is_clamped and params.max_tokens is not None:
        rest = max(service.facts.max_model_len - len(prompt.token_ids), 1)
        params = replace(params, max_tokens=min(params.max_tokens, rest))
    return PreparedRequest(body, [prompt], fan_out(params, 1, n), chat.grammar, "messages"), chat.tools


def _fields(service: Service, body: GenerationRequest, params: SamplingParams) -> ChoiceFields:
    return ChoiceFields(
        codec=service.facts.codec,
        n=body.n or 1,
        alternatives=params.logprobs,
        has_token_ids=bool(body.return_token_ids),
        prompt_alternatives=body.prompt_logprobs,
        shows_special=not params.skip_special_tokens,
    )


def _encoder(service: Service, *, adds_special: bool) -> TextEncoder:
    return TextEncoder(service.facts.codec, adds_special, service.facts.max_model_len)


async def answered(
    service: Service, request: Request, prepared: PreparedRequest, form: AnswerFormat, prefix: str
) -> Response:
    """Generates and returns the answer.

    prefix: beginning of the answer's id.
    """
    head = service.head(prefix, prepared.body.model)
    generation = await service.generate(head.id, prepared)
    request.state.generation = generation  # read by the log, metrics and traces of answers
    counter = UsageCounter(prepared.prompts, generation.requests)
    answer = Answer(generation, form, counter, head, service.in_thread)
    if prepared.body.stream:
        return EventStream(generation, stream_events(answer))
    return await whole_answer(request, answer)
