"""POST /v1/completions and /v1/chat/completions."""

import dataclasses

from starlette.requests import Request
from starlette.responses import Response

from jmoe.engine.grammar import CompiledGrammar
from jmoe.engine.request import SamplingParams
from jmoe.server.answers import AnswerFormat, ChatFormat, CompletionFormat, Usage
from jmoe.server.body import check_chat, check_completion
from jmoe.server.delivery import EventStream, stream_events, whole_answer
from jmoe.server.prompts import Prompt, chat_prompt, completion_prompts
from jmoe.server.sampling import chat_params, completion_params, fan_out
from jmoe.server.schema import ChatRequest, CompletionRequest, GenerationRequest, NamedTool
from jmoe.server.service import Service
from jmoe.server.structured import wanted_grammar
from jmoe.server.tool_answers import ToolFormat
from jmoe.server.tools import forced_tools, plain_tools


@dataclasses.dataclass(frozen=True)
class Work:
    """What a request asks of the engine. params: one set an answer. field: of the body, to blame for a prompt
    that the engine refuses."""

    prompts: list[Prompt]
    params: list[SamplingParams]
    grammar: CompiledGrammar | None
    field: str


async def create_completion(service: Service, request: Request) -> Response:
    body = await service.read(request, CompletionRequest)
    check_completion(body)
    params, n = completion_params(body, service.engine.vocab_size), body.n or 1
    codec, echo, special = service.engine.codec, bool(body.echo), body.add_special_tokens is not False
    limit = service.engine.max_model_len
    prompts = await service.in_thread(
        lambda: completion_prompts(body.prompt, codec, echo=echo, special=special, limit=limit)
    )
    ids, logprobs = bool(body.return_token_ids), body.logprobs is not None
    form = CompletionFormat(codec, prompts, n, echo=echo, logprobs=logprobs, token_ids=ids)
    work = Work(prompts, fan_out(params, len(prompts), n), await _grammar(service, body), "prompt")
    return await _answer(service, request, body, work, form, "cmpl")


async def create_chat_completion(service: Service, request: Request) -> Response:
    body = await service.read(request, ChatRequest)
    check_chat(body)
    grammar = await _grammar(service, body)
    # A grammar says itself where the answer ends; a string that ends a turn may stand inside one.
    turn_ends = () if grammar is not None else service.turn_ends
    params, n = chat_params(body, service.engine.vocab_size, turn_ends), body.n or 1
    codec, special, limit = service.engine.codec, bool(body.add_special_tokens), service.engine.max_model_len
    variables = body.chat_template_kwargs or {}
    prompt = await service.in_thread(
        lambda: chat_prompt(
            body.messages, service.template, codec, plain_tools(body), variables, special, limit
        )
    )
    form, functions = ChatFormat(codec, n, params.logprobs, bool(body.return_token_ids)), forced_tools(body)
    if functions:
        form = ToolFormat(form, functions, named=isinstance(body.tool_choice, NamedTool))
    return await _answer(
        service, request, body, Work([prompt], fan_out(params, 1, n), grammar, "messages"), form, "chatcmpl"
    )


async def _grammar(service: Service, body: GenerationRequest) -> CompiledGrammar | None:
    wanted = wanted_grammar(body)
    return None if wanted is None else await service.grammars.compile(wanted.grammar, wanted.param)


async def _answer(
    service: Service, request: Request, body: GenerationRequest, work: Work, form: AnswerFormat, prefix: str
) -> Response:
    head, usage = service.head(prefix), Usage(work.prompts)
    generation = await service.generate(head["id"], work.prompts, work.params, work.field, work.grammar)
    request.state.generation = generation  # for who logs and traces the answer
    if body.stream:
        return EventStream(generation, stream_events(generation, form, usage, head, body.stream_options))
    return await whole_answer(request, generation, form, usage, head)
