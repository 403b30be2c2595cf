"""POST /v1/completions and /v1/chat/completions."""

from starlette.requests import Request
from starlette.responses import Response

from jmoe.server.answers import AnswerFormat, ChatFormat, CompletionFormat, Usage
from jmoe.server.body import check_chat, check_completion
from jmoe.server.delivery import EventStream, stream_events, whole_answer
from jmoe.server.prompts import Prompt, chat_prompt, completion_prompts
from jmoe.server.sampling import chat_params, completion_params, fan_out
from jmoe.server.schema import ChatRequest, CompletionRequest, GenerationRequest
from jmoe.server.service import Service


async def create_completion(service: Service, request: Request) -> Response:
    body = await service.read(request, CompletionRequest)
    check_completion(body)
    params, n = completion_params(body, service.engine.vocab_size), body.n or 1
    codec, echo = service.engine.codec, bool(body.echo)
    prompts = await service.in_thread(completion_prompts, body.prompt, codec, echo)
    ids, logprobs = bool(body.return_token_ids), body.logprobs is not None
    form = CompletionFormat(codec, prompts, n, echo=echo, logprobs=logprobs, token_ids=ids)
    generation_params = fan_out(params, len(prompts), n)
    return await _answer(service, request, body, prompts, generation_params, form, "cmpl", "prompt")


async def create_chat_completion(service: Service, request: Request) -> Response:
    body = await service.read(request, ChatRequest)
    check_chat(body)
    params, n = chat_params(body, service.engine.vocab_size, service.turn_ends), body.n or 1
    codec = service.engine.codec
    prompt = await service.in_thread(chat_prompt, body.messages, service.template, codec)
    form = ChatFormat(codec, n, params.logprobs, bool(body.return_token_ids))
    return await _answer(
        service, request, body, [prompt], fan_out(params, 1, n), form, "chatcmpl", "messages"
    )


async def _answer(
    service: Service,
    request: Request,
    body: GenerationRequest,
    prompts: list[Prompt],
    params: list,
    form: AnswerFormat,
    prefix: str,
    param: str,
) -> Response:
    head, usage = service.head(prefix), Usage(prompts)
    generation = await service.generate(head["id"], prompts, params, param)
    request.state.generation = generation  # for who logs and traces the answer
    if body.stream:
        return EventStream(generation, stream_events(generation, form, usage, head, body.stream_options))
    return await whole_answer(request, generation, form, usage, head)
