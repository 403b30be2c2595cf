"""POST /v1/completions and /v1/chat/completions."""

import dataclasses
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from jmoe.engine.request import SamplingParams
from jmoe.server.answer.calls import ToolFormat
from jmoe.server.answer.delivery import Answer, EventStream, stream_events, whole_answer
from jmoe.server.answer.formats import AnswerFormat, ChatFormat, CompletionFormat, Usage
from jmoe.server.request.body import check_chat, check_completion
from jmoe.server.request.params import chat_params, completion_params, fan_out
from jmoe.server.request.prompts import Prompt, chat_prompt, completion_prompts
from jmoe.server.request.schema import ChatRequest, CompletionRequest, GenerationRequest, NamedTool
from jmoe.server.request.structured import Wanted, wanted_grammar
from jmoe.server.request.tools import forced_tools, plain_tools
from jmoe.server.service import Service


@dataclasses.dataclass(frozen=True)
class Work:
    """What a request asks of the engine.

    body: the checked request body.
    prompts: the request's prompts.
    params: sampling parameters, one set per answer, prompt-major.
    wanted: grammar that the answers must follow, if any.
    form: format of the answers.
    field: body field named in the error if the engine refuses a prompt.
    """

    body: GenerationRequest
    prompts: list[Prompt]
    params: list[SamplingParams]
    wanted: Wanted | None
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
    codec, echo, special = service.engine.codec, bool(body.echo), body.add_special_tokens is not False
    wanted = wanted_grammar(body)
    limit = service.engine.max_model_len
    prompts = completion_prompts(body.prompt, codec, echo=echo, special=special, limit=limit)
    ids, logprobs = bool(body.return_token_ids), body.logprobs is not None
    form = CompletionFormat(codec, prompts, n, echo=echo, logprobs=logprobs, token_ids=ids)
    return Work(body, prompts, fan_out(params, len(prompts), n), wanted, form, "prompt")


def _chat(service: Service, raw: bytes) -> Work:
    """Does all work whose time grows with the body."""
    body = service.decode(raw, ChatRequest)
    check_chat(body)
    wanted = wanted_grammar(body)
    # A grammar defines where the answer ends; a turn-end string may occur inside such an answer.
    turn_ends = () if wanted is not None else service.turn_ends
    params, n = chat_params(body, service.engine.vocab_size, turn_ends), body.n or 1
    codec, special, limit = service.engine.codec, bool(body.add_special_tokens), service.engine.max_model_len
    variables = body.chat_template_kwargs or {}
    tools = plain_tools(body)
    prompt = chat_prompt(body.messages, service.template, codec, tools, variables, special, limit)
    form, functions = ChatFormat(codec, n, params.logprobs, bool(body.return_token_ids)), forced_tools(body)
    if functions:
        form = ToolFormat(form, functions, named=isinstance(body.tool_choice, NamedTool))
    return Work(body, [prompt], fan_out(params, 1, n), wanted, form, "messages")


async def _answer(service: Service, request: Request, work: Work, prefix: str) -> Response:
    wanted, head = work.wanted, service.head(prefix)
    grammar = None if wanted is None else await service.grammars.compile(wanted.grammar, wanted.param)
    generation = await service.generate(head["id"], work.prompts, work.params, work.field, grammar)
    usage = Usage(work.prompts, generation.requests)
    request.state.generation = generation  # read by the log, metrics and traces of answers
    answer = Answer(generation, work.form, usage, head, service.in_thread)
    if work.body.stream:
        return EventStream(generation, stream_events(answer, work.body.stream_options))
    return await whole_answer(request, answer)
