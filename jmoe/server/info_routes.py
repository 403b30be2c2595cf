"""Everything that does not generate: health, models, tokenizer, metrics, statistics."""

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from jmoe import __version__
from jmoe.server.body import check_messages
from jmoe.server.errors import invalid, json_response
from jmoe.server.logprobs import token_name
from jmoe.server.openapi import openapi_document
from jmoe.server.prompts import chat_prompt, encode
from jmoe.server.schema import DetokenizeRequest, TokenizeRequest
from jmoe.server.service import Service


async def live(service: Service, request: Request) -> Response:
    """200 while the engine's thread lives, also under load and while draining."""
    service.check_alive()
    return json_response({"status": "ok"})


async def ready(service: Service, request: Request) -> Response:
    """200 while new work is taken. Load generators ask it as /health, SageMaker as /ping."""
    service.check_ready()
    return json_response({"status": "ok"})


async def version(service: Service, request: Request) -> Response:
    return json_response({"version": __version__})


async def openapi(service: Service, request: Request) -> Response:
    with_key = service.settings.api_key is not None
    return json_response(openapi_document(__version__, service.model, with_key=with_key))


async def metrics(service: Service, request: Request) -> Response:
    text = await service.in_thread(service.metrics.text)  # it asks the engine, which may be in a step
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "jmoe",
        "max_model_len": service.engine.max_model_len,
    }


async def models(service: Service, request: Request) -> Response:
    return json_response({"object": "list", "data": [_model(service)]})


async def model(service: Service, request: Request) -> Response:
    service.check_model(request.path_params["id"])
    return json_response(_model(service))


async def tokenize(service: Service, request: Request) -> Response:
    body = await service.read(request, TokenizeRequest)
    codec = service.engine.codec
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if body.messages is not None:
        messages = body.messages
        check_messages(messages)
        special = bool(body.add_special_tokens)
        prompt = await service.in_thread(
            lambda: chat_prompt(messages, service.template, codec, special=special)
        )
        ids = prompt.token_ids
    else:
        text = body.prompt or ""
        special = body.add_special_tokens is not False
        ids = await service.in_thread(lambda: encode(text, codec, "prompt", special=special))
    names = {"token_strs": [token_name(t, codec) for t in ids]} if body.return_token_strs else {}
    return json_response(
        {"count": len(ids), "max_model_len": service.engine.max_model_len, "tokens": ids, **names}
    )


async def detokenize(service: Service, request: Request) -> Response:
    body = await service.read(request, DetokenizeRequest)
    codec, size = service.engine.codec, service.engine.vocab_size
    if codec is None:
        raise invalid("this model has no tokenizer", "tokens")
    outside = next((t for t in body.tokens if t >= size), None)
    if outside is not None:
        raise invalid(f"token id {outside} is outside the vocabulary of {size}", "tokens")
    text = await service.in_thread(lambda: codec.decode(body.tokens, skip_special=False))
    return json_response({"prompt": text})
