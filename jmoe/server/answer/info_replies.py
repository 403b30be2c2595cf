"""The structs of the answers about the server and its model; see ``answer.replies``."""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from jmoe.server.request.fields.base import Count, Strict


class Tokens(Strict, kw_only=True):
    """The tokens of a text or of a chat.

    count: number of tokens.
    max_model_len: longest context, in tokens.
    tokens: ids of the tokens.
    token_strs: text of each token; absent unless requested.
    """

    count: Count
    max_model_len: Count
    tokens: list[Count]
    token_strs: list[str] | UnsetType = UNSET


class Text(Strict):
    prompt: str


class Status(Strict):
    status: Literal["ok"]


class Version(Strict):
    version: str


class Model(Strict):
    """A name of the served model, for clients of OpenAI and of Anthropic.

    id: name that requests use.
    object: type of the entry.
    created: time of the server's start, in seconds since 1970.
    owned_by: name of the server.
    max_model_len: longest context, in tokens.
    type: type of the entry, as Anthropic names it.
    display_name: name that requests use.
    created_at: time of the server's start (RFC 3339).
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: Count
    type: Literal["model"]
    display_name: str
    created_at: str


class Models(Strict):
    """All names of the served model.

    object: type of the answer.
    data: one entry per name.
    has_more: always false.
    first_id: name of the first entry.
    last_id: name of the last entry.
    """

    object: Literal["list"]
    data: list[Model]
    has_more: Literal[False]
    first_id: str
    last_id: str


class PhaseStats(Struct):
    """steps: number of steps.
    per_layer: one object of numbers per MoE layer.
    """

    steps: Count
    per_layer: list[dict[str, Any]]


class MoEStats(Struct):
    model: dict[str, Any]
    prefill: PhaseStats
    decode: PhaseStats
