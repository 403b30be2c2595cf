"""Our own reductions of families' chat templates, and the models that chat by them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from jmoe.engine.reports import ModelFacts
from jmoe.server.request.checks import CheckedChat, check_chat
from jmoe.server.request.conversation.chat_model import ChatModel, chat_model
from jmoe.server.request.decoding import decode
from jmoe.server.request.prompts import Prompt, TextEncoder, chat_prompt
from jmoe.server.request.schema import ChatRequest
from jmoe.server.request.tools import ToolSupport
from jmoe.server.template.chat_template import ChatTemplate

FOLDER = Path(__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
NO_CALLS = ToolSupport(None, "none is wanted", has_definitions=False)
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "d"}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}}
ASKED = {"role": "user", "content": "What is there?"}


class TextCodec:
    """A codec without tokens: only the rendered text matters."""

    def encode(self, text: str, *, special: bool, limit: int | None = None) -> list[int]:
        return [1]


def template(name: str) -> ChatTemplate:
    return ChatTemplate((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), TOKENS)


def model(name: str, codec: Any = None, setting: str = "auto", vocab_size: int = 258) -> ChatModel:
    """Returns the model of a template's name. Without a codec no format has a dialect."""
    return chat_model(template(name), ModelFacts(codec, 64, vocab_size, frozenset()), setting)


def checked(chat: ChatModel, messages: list[dict], **fields: Any) -> CheckedChat:
    body = decode(json.dumps({"messages": messages, **fields}).encode(), ChatRequest)
    return check_chat(body, chat.tools)


def prompted(chat: ChatModel, messages: list[dict], **fields: Any) -> Prompt:
    encoder = TextEncoder(chat.codec or TextCodec(), adds_special=False)  # type: ignore[arg-type]
    return chat_prompt(checked(chat, messages, **fields), chat, encoder)


def call(id: str, name: str = "look", **arguments: Any) -> dict:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def result(id: str, content: str = "fine") -> dict:
    return {"role": "tool", "tool_call_id": id, "content": content}


def calls(*made: dict, content: str | None = None, **more: Any) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(made), **more}


def special(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]
