"""Everything that does not generate: health, models, tokenizer, metrics, statistics."""

from datetime import UTC, datetime
from functools import partial

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from jmoe import __version__
from jmoe.server.answer.info_replies import Model, Models, Status, Text, Tokens, Version
from jmoe.server.answer.logprobs import token_name
from jmoe.server.answer.pieces import PiecesResponse, encoded, joined
from jmoe.server.errors import invalid, json_response, refused
from jmoe.server.request.bounds import MAX_TOKENIZED
from jmoe.server.request.checks import check_chat
from jmoe.server.request.prompts import TextEncoder, chat_prompt
from jmoe.server.request.schema import ChatRequest, DetokenizeRequest, TokenizeRequest
from jmoe.server.service import Service


async def live(service: Service, request: Request) -> Response:
    """Answers 200 while the engine is alive, also under load and while draining."""
    service.check_alive()
    return json_response(Status("ok"))


async def ready(service: Service, request: Request) -> Response:
    """Answers 200 while new work is accepted. Load generators request it as /health, SageMaker as /ping."""
    service.check_ready()
    return json_response(Status("ok"))


async def version(service: Service, request: Request) -> Response:
    return json_response(Version(__version__))


async def metrics(service: Service, request: Request) -> Response:
    text = await service.in_thread(service.metrics.text)  # it asks the engine, which may be in a step
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


def _model(service: Service, name: str) -> Model:
    return Model(
        id=name,
        object="model",
        created=service.start_time,
        owned_by="jmoe",
        max_model_len=service.facts.max_model_len,
        type="model",
        display_name=name,
        created_at=datetime.fromtimestamp(service.start_time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


async def models(service: Service, request: Request) -> Response:
    entries = [_model(service, name) for name in service.models]
    return json_response(Models("list", entries, False, entries[0].id, entries[-1].id))


async def model(service: Service, request: Request) -> Response:
    service.check_model(request.path_params["id"])
    return json_response(_model(service, request.path_params["id"]))


async def tokenize(service: Service, request: Request) -> Response:
    return PiecesResponse(await service.read(request, partial(_tokens, service)))


def _tokens(service: Service, raw: bytes) -> list[bytes]:
    body, codec = service.decode(raw, TokenizeRequest), service.facts.codec
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if body.messages is not None:
        chat = check_chat(ChatRequest(messages=body.messages), service.chat.tools)
        encoder = TextEncoder(codec, bool(body.add_special_tokens))
        ids = chat_prompt(chat, service.chat, encoder).token_ids
    else:
        text = body.prompt or ""
        if len(text) > MAX_TOKENIZED:
            raise invalid(f"prompt has {len(text)} characters; the limit is {MAX_TOKENIZED}", "prompt")
        ids = TextEncoder(codec, body.add_special_tokens is not False).encode(text, "prompt")
    answer = Tokens(count=len(ids), max_model_len=service.facts.max_model_len, tokens=ids)
    if body.return_token_strs:
        try:
            names = {token: token_name(token, codec) for token in set(ids)}
        except ValueError as error:
            raise refused(error, "return_token_strs") from None
        answer.token_strs = [names[token] for token in ids]
    return list(joined(encoded(answer)))


async def detokenize(service: Service, request: Request) -> Response:
    return PiecesResponse(await service.read(request, partial(_text, service)))


def _text(service: Service, raw: bytes) -> list[bytes]:
    body = service.decode(raw, DetokenizeRequest)
    codec, size = service.facts.codec, service.facts.vocab_size
    if codec is None:
        raise invalid("this model has no tokenizer", "tokens")
    outside = next((t for t in body.tokens if t >= size), None)
    if outside is not None:
        raise invalid(f"token id {outside} is outside the vocabulary of {size}", "tokens")
    try:
        text = codec.decode(body.tokens, skip_special=False)
    except ValueError as error:
        raise refused(error, "tokens") from None
    return list(joined(encoded(Text(text))))
