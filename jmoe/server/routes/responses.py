"""The Responses API: /v1/responses and what stands below it."""

from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from jmoe.server.answer.formats import AnswerFormat
from jmoe.server.answer.responses.format import ResponsesFormat
from jmoe.server.answer.responses.replies import Deleted, InputTokens
from jmoe.server.answer.responses.store import StoredResponse
from jmoe.server.errors import ApiError, invalid, json_response
from jmoe.server.request.apis.conversion import Body, decode_open, renaming
from jmoe.server.request.apis.responses.convert import NAMES, ResponsesChat, responses_chat
from jmoe.server.request.apis.responses.fields import InputRequest, ResponsesRequest
from jmoe.server.request.apis.responses.items import found_items, items_of
from jmoe.server.request.prepared import PreparedRequest
from jmoe.server.routes.generate import answered, prepared_chat
from jmoe.server.service import Service

PATH = "/v1/responses"


async def create_response(service: Service, request: Request) -> Response:
    prepared, form = await service.read(request, partial(_response, service))
    return await answered(service, request, prepared, form, "resp_")


async def count_input(service: Service, request: Request) -> Response:
    return json_response(await service.read(request, partial(_count, service)))


async def get_response(service: Service, request: Request) -> Response:
    stored = _stored(service, request.path_params["id"])
    if stored is None:
        raise _missing(request)
    return Response(stored.reply, media_type="application/json")


async def delete_response(service: Service, request: Request) -> Response:
    id, store = request.path_params["id"], service.response_store
    if store is None or not store.delete(id):
        raise _missing(request)
    return json_response(Deleted(id, "response", True))


def _response(service: Service, raw: bytes) -> tuple[PreparedRequest, AnswerFormat]:
    """Does all work whose time grows with the body."""
    body = _decoded(service, raw, ResponsesRequest)
    items, store = _items(service, body), service.response_store
    with renaming(NAMES):
        made = _chat(service, body, items)
        prepared, tools = prepared_chat(service, made.chat, is_clamped=True)
    keep = None
    if store is not None and body.store is not False:
        keep = partial(store.keep, given=msgspec.json.encode(items))
    return prepared.renamed(NAMES), ResponsesFormat(body, tools, made.tools.names, keep)


def _count(service: Service, raw: bytes) -> InputTokens:
    body = _decoded(service, raw, InputRequest)
    with renaming(NAMES):
        made = _chat(service, body, _items(service, body))
        prepared, _ = prepared_chat(service, made.chat)
    return InputTokens("response.input_tokens", len(prepared.prompts[0].token_ids))


def _decoded(service: Service, raw: bytes, kind: type[Body]) -> Body:
    body = decode_open(raw, kind, service.notices, PATH)
    service.check_model(getattr(body, "model", None))
    return body


def _chat(service: Service, body: InputRequest, items: list[dict[str, Any]]) -> ResponsesChat:
    return responses_chat(body, items, service.notices)


def _items(service: Service, body: InputRequest) -> list[dict[str, Any]]:
    """Returns the whole conversation of a request."""
    store, id = service.response_store, body.previous_response_id
    own = found_items(items_of(body.input), lambda item: None if store is None else store.item(item))
    if id is None:
        return own
    stored = _stored(service, id)
    if stored is None:
        message = f"Previous response with id {id!r} not found: {_why_missing(service)}"
        raise invalid(message, "previous_response_id", "previous_response_not_found")
    return [*stored.items(), *own]


def _stored(service: Service, id: str) -> StoredResponse | None:
    return None if service.response_store is None else service.response_store.get(id)


def _missing(request: Request) -> ApiError:
    id = request.path_params["id"]
    return ApiError(404, f"Response with id {id[:128]!r} not found", param="id", code="response_not_found")


def _why_missing(service: Service) -> str:
    kept = "the server keeps only the newest ones in memory, and none of requests with store: false"
    return "the server keeps none" if service.response_store is None else kept
