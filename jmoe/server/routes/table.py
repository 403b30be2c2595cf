"""The routes: all that is known of each is declared here, and nowhere else.

``app`` serves them and derives from them what the layers around it need; the OpenAPI document describes them.
"""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from jmoe import __version__
from jmoe.server.answer import info_replies, replies
from jmoe.server.answer.anthropic.replies import MessageEvent, MessageReply, TokenCount
from jmoe.server.answer.responses.replies import Deleted, InputTokens, ResponseEvent, ResponseReply
from jmoe.server.errors import AnthropicError, json_response
from jmoe.server.request.apis.anthropic.fields import CountRequest, MessagesRequest
from jmoe.server.request.apis.responses.fields import InputRequest, ResponsesRequest
from jmoe.server.request.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from jmoe.server.route_record import EVENTS, JSON, Route
from jmoe.server.routes import dashboard, generate, info, messages, responses
from jmoe.server.routes.openapi import openapi_document
from jmoe.server.service import Service

STATUS = {JSON: info_replies.Status}
PAGE = {"text/html": str}
GENERATES = (400, 404, 408, 413, 415, 503)


async def openapi(service: Service, request: Request) -> Response:
    """Returns the OpenAPI document. It stands in this file because it describes the routes, of which it is
    one."""
    with_key = service.settings.api_key is not None
    make = partial(openapi_document, ROUTES, __version__, service.models, with_key=with_key)
    return json_response(await service.in_thread(make))


# Machines ask the quiet ones every few seconds. The page is open because it holds no data: it asks for the
# key that its data needs. The names of operations are those of OpenTelemetry's GenAI conventions.
ROUTES: tuple[Route[Service], ...] = (
    Route(
        "GET", "/live", info.live, "200 while the engine lives", STATUS, (503,),
        is_open=True, is_quiet=True, is_probe=True,
    ),
    Route(
        "GET", "/ready", info.ready, "200 while new requests are taken", STATUS, (503,),
        is_open=True, is_quiet=True, is_probe=True,
    ),
    Route(
        "GET", "/health", info.ready, "The same as /ready", STATUS, (503,),
        is_open=True, is_quiet=True, is_probe=True,
    ),
    Route(
        "GET", "/ping", info.ready, "The same as /ready", STATUS, (503,),
        is_open=True, is_quiet=True, is_probe=True,
    ),
    Route("GET", "/version", info.version, "The server's version", {JSON: info_replies.Version}),
    Route("GET", "/v1/models", info.models, "The served models", {JSON: info_replies.Models}),
    Route(  # a model's name may hold slashes
        "GET", "/v1/models/{id:path}", info.model, "One served model", {JSON: info_replies.Model}, (404,),
    ),
    Route(
        "GET", "/moe/stats", dashboard.stats, "What the experts did, by layer and expert",
        {JSON: info_replies.MoEStats}, (503,),
    ),
    # Without a summary: it never ends, and who tries every operation of the document would wait for it.
    Route("GET", "/moe/events", dashboard.events, None, {}),
    Route(
        "GET", "/dashboard", dashboard.page, "A page that shows it while it happens", PAGE, is_open=True,
    ),
    Route("GET", "/moe", dashboard.page, "The same as /dashboard", PAGE, is_open=True),
    Route("GET", "/openapi.json", openapi, "This document", {JSON: dict}),
    Route("GET", "/metrics", info.metrics, "Prometheus metrics", {"text/plain": str}, is_quiet=True),
    Route(
        "POST", "/v1/completions", generate.create_completion, "Continue a text or token ids",
        {JSON: replies.Completion, EVENTS: replies.Completion}, GENERATES,
        CompletionRequest, {"prompt": "Once upon a time", "max_tokens": 8},
        operation="text_completion",
    ),
    Route(
        "POST", "/v1/chat/completions", generate.create_chat_completion, "Answer a conversation",
        {JSON: replies.ChatCompletion, EVENTS: replies.ChatCompletionChunk}, GENERATES,
        ChatRequest, {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
        operation="chat",
    ),
    Route(
        "POST", "/v1/responses", responses.create_response, "Answer a conversation (OpenAI's Responses API)",
        {JSON: ResponseReply, EVENTS: ResponseEvent}, GENERATES,
        ResponsesRequest, {"input": "Hello", "max_output_tokens": 8},
        operation="chat", has_named_events=True,
    ),
    Route(
        "POST", "/v1/responses/input_tokens", responses.count_input, "Count the tokens of a prompt",
        {JSON: InputTokens}, GENERATES, InputRequest, {"input": "Hello"},
    ),
    Route(
        "GET", "/v1/responses/{id}", responses.get_response, "A stored answer",
        {JSON: ResponseReply}, (404,),
    ),
    Route(
        "DELETE", "/v1/responses/{id}", responses.delete_response, "Forget a stored answer",
        {JSON: Deleted}, (404,),
    ),
    Route(
        "POST", "/v1/messages", messages.create_message, "Answer a conversation (Anthropic's Messages API)",
        {JSON: MessageReply, EVENTS: MessageEvent}, GENERATES,
        MessagesRequest, {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
        operation="chat", error=AnthropicError, has_named_events=True,
    ),
    Route(
        "POST", "/v1/messages/count_tokens", messages.count_tokens, "Count the tokens of a prompt",
        {JSON: TokenCount}, GENERATES,
        CountRequest, {"messages": [{"role": "user", "content": "Hello"}]}, error=AnthropicError,
    ),
    Route(
        "POST", "/tokenize", info.tokenize, "Text to token ids", {JSON: info_replies.Tokens}, GENERATES,
        TokenizeRequest, {"prompt": "Hello"},
    ),
    Route(
        "POST", "/detokenize", info.detokenize, "Token ids to text", {JSON: info_replies.Text}, GENERATES,
        DetokenizeRequest, {"tokens": [1, 2]},
    ),
)  # fmt: skip
