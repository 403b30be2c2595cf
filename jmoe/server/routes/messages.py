"""Anthropic's Messages API: /v1/messages and /v1/messages/count_tokens."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from jmoe.server.answer.anthropic.format import MessagesFormat
from jmoe.server.answer.anthropic.replies import TokenCount
from jmoe.server.answer.formats import AnswerFormat
from jmoe.server.errors import ANTHROPIC_PATH, ApiError, json_response
from jmoe.server.request.apis.anthropic.convert import NAMES, messages_chat
from jmoe.server.request.apis.anthropic.fields import CountRequest, MessagesRequest
from jmoe.server.request.apis.conversion import decode_open, renaming
from jmoe.server.request.prepared import PreparedRequest
from jmoe.server.routes.generate import answered, prepared_chat
from jmoe.server.service import Service


async def create_message(service: Service, request: Request) -> Response:
    try:
        prepared, form = await service.read(request, partial(_message, service))
        return await answered(service, request, prepared, form, "msg_")
    except ApiError as error:
        raise _recognisable(error) from None


async def count_tokens(service: Service, request: Request) -> Response:
    return json_response(await service.read(request, partial(_count, service)))


def _message(service: Service, raw: bytes) -> tuple[PreparedRequest, AnswerFormat]:
    """Does all work whose time grows with the body."""
    body = decode_open(raw, MessagesRequest, service.notices, ANTHROPIC_PATH)
    service.check_model(body.model)
    with renaming(NAMES):
        prepared, tools = prepared_chat(service, messages_chat(body, service.notices), is_clamped=True)
    return prepared.renamed(NAMES), MessagesFormat(tools, body.stop_sequences or ())


def _count(service: Service, raw: bytes) -> TokenCount:
    body = decode_open(raw, CountRequest, service.notices, f"{ANTHROPIC_PATH}/count_tokens")
    service.check_model(body.model)
    with renaming(NAMES):
        prepared, _ = prepared_chat(service, messages_chat(body, service.notices))
    return TokenCount(len(prepared.prompts[0].token_ids))


def _recognisable(error: ApiError) -> ApiError:
    """Returns the error with the words by which this API's clients know that a conversation is too long; they
    then shorten it."""
    if error.code != "context_length_exceeded":
        return error
    return ApiError(error.status, f"prompt is too long: {error.message}", param=error.param, code=error.code)
