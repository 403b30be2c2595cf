"""How an answer uses tools is decided once, from the request's tools and tool_choice."""

import json

import msgspec
import pytest

from jmoe.server.errors import ApiError
from jmoe.server.request.checks import check_chat
from jmoe.server.request.decoding import decode
from jmoe.server.request.schema import ChatRequest

TOOLS = [{"type": "function", "function": {"name": name, "strict": None}} for name in ("look", "stop")]
NAMED = {"type": "function", "function": {"name": "stop"}}


def checked(**fields):
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return check_chat(decode(json.dumps(body).encode(), ChatRequest))


@pytest.mark.parametrize(
    ("choice", "names", "is_named"), [("required", ["look", "stop"], False), (NAMED, ["stop"], True)]
)
def test_a_call_is_of_the_functions_that_the_request_allows(choice, names, is_named):
    chat = checked(tools=TOOLS, tool_choice=choice)
    assert chat.tools is not None and chat.grammar is not None
    assert [function.name for function in chat.tools.functions] == names
    assert chat.tools.is_named == is_named and chat.grammar.param == "tools"
    assert chat.tools.definitions == TOOLS, "the template sees all tools as they were sent"


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_a_call_the_answer_is_free(fields):
    chat = checked(**fields)
    assert chat.tools is None and chat.grammar is None


def test_a_checked_chat_cannot_change():
    with pytest.raises(AttributeError):
        checked().tools = None  # type: ignore[misc]


def test_two_grammars_are_refused():
    with pytest.raises(ApiError, match="tools both say what the answer must be") as refusal:
        checked(tools=TOOLS, tool_choice=NAMED, response_format={"type": "json_object"})
    assert msgspec.json.decode(refusal.value.response().body)["error"]["param"] == "tools"
