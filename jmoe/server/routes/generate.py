"""POST /v1/completions and /v1/chat/completions.

Both go the same way: the body is read and checked, its prompts become tokens, the engine generates, and the
format writes the answer.
"""

from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from jmoe.engine.request import SamplingParams
from jmoe.server.answer.calls import ToolFormat
from jmoe.server.answer.chats import ChatFormat
from jmoe.server.answer.completions import CompletionFormat
from jmoe.server.answer.delivery import Answer, EventStream, UsageCounter, stream_events, whole_answer
from jmoe.server.answer.formats import AnswerFormat, ChoiceFields
from jmoe.server.request.checks import check_chat, check_completion
from jmoe.server.request.params import chat_params, completion_params, fan_out
from jmoe.server.request.prompts import Prompt, TextEncoder, chat_prompt, completion_prompts
from jmoe.server.request.schema import ChatRequest, CompletionRequest, GenerationRequest
from jmoe.server.request.structured import GrammarRequest, requested_grammar
from jmoe.server.service import Service


@dataclass(frozen=True)
class Work:
    """What a request wants from the engine.

    body: the checked request body.
    prompts: the request's prompts.
    params: sampling parameters, one set per answer, prompt-major.
    grammar: grammar that the answers must follow, if any.
    form: format of the answers.
    field: body field named in the error if the engine refuses a prompt.
    """

    body: GenerationRequest
    prompts: list[Prompt]
    params: list[SamplingParams]
    grammar: GrammarRequest | None
    form: AnswerFormat
    field: str


async def create_completion(service: Service, request: Request) -> Response:
    return await _answer(service, request, await service.read(request, partial(_completion, service)), "cmpl")


async def create_chat_completion(service: Service, request: Request) -> Response:
    return await _answer(service, request, await service.read(request, partial(_chat, service)), "chatcmpl")


def _completion(service: Service, raw: bytes) -> Work:
    """Does all work whose time grows with the body."""
    body = service.decode(raw, CompletionRequest)
    check_completion(body)
    params, n = completion_params(body, service.engine.vocab_size), body.n or 1
    grammar = requested_grammar(body)
    encoder = _encoder(service, adds_special=body.add_special_tokens is not False)
    prompts = completion_prompts(body.prompt, encoder, echo=bool(body.echo))
    fields = ChoiceFields(encoder.codec, n, params.logprobs, bool(body.return_token_ids))
    form = CompletionFormat(fields, prompts, echo=bool(body.echo))
    return Work(body, prompts, fan_out(params, len(prompts), n), grammar, form, "prompt")


def _chat(service: Service, raw: bytes) -> Work:
    """Does all work whose time grows with the body."""
    chat = check_chat(service.decode(raw, ChatRequest))
    body, tools = chat.body, chat.tools
    params, n = chat_params(chat, service.engine.vocab_size, service.turn_ends), body.n or 1
    encoder = _encoder(service, adds_special=bool(body.add_special_tokens))
    shown, variables = None if tools is None else tools.definitions, body.chat_template_kwargs or {}
    prompt = chat_prompt(body.messages, service.template, encoder, shown, variables)
    fields = ChoiceFields(encoder.codec, n, params.logprobs, bool(body.return_token_ids))
    form = ChatFormat(fields) if tools is None else ToolFormat(fields, tools)
    return Work(body, [prompt], fan_out(params, 1, n), chat.grammar, form, "messages")


def _encoder(service: Service, *, adds_special: bool) -> TextEncoder:
    return TextEncoder(service.engine.codec, adds_special, service.engine.max_model_len)


async def _answer(service: Service, request: Request, work: Work, prefix: str) -> Response:
    head = service.head(prefix)
    grammar = None if work.grammar is None else await service.grammars.compile(work.grammar)
    generation = await service.generate(head.id, work.prompts, work.params, work.field, grammar)
    request.state.generation = generation  # read by the log, metrics and traces of answers
    counter = UsageCounter(work.prompts, generation.requests)
    answer = Answer(generation, work.form, counter, head, service.in_thread)
    if work.body.stream:
        return EventStream(generation, stream_events(answer, work.body.stream_options))
    return await whole_answer(request, answer)
