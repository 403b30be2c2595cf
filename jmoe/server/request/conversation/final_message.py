"""Answers that continue the last message, which the assistant began."""

from jmoe.server.errors import invalid
from jmoe.server.request.schema import ChatRequest
from jmoe.server.template.probe import Messages

FIELD = "continue_final_message"
TAG = "\U0010fffd "  # a private character, and a space that a template's trim removes
REWRITES = f"{FIELD}: the chat template rewrites the last message, so that its text cannot be continued"


def check_final_message(body: ChatRequest) -> None:
    """Refuses to continue a message that cannot be continued."""
    if not body.continue_final_message:
        return
    if body.add_generation_prompt:
        raise invalid(f"{FIELD} and add_generation_prompt exclude each other", FIELD)
    last = body.messages[-1]
    if last.role != "assistant":
        raise invalid(
            f"{FIELD} needs a last message of the assistant, it is of the role {last.role!r}", FIELD
        )
    if last.tool_calls:
        raise invalid(f"{FIELD} cannot continue a message with tool_calls", FIELD)


def tagged(messages: Messages) -> tuple[Messages, str]:
    """Returns the messages with a tag after the last one's text, and that text."""
    last = messages[-1]
    content = last.get("content") or ""
    if isinstance(content, list):
        text = content[-1]["text"] if content else ""
        parts = [*content[:-1], {"type": "text"} | (content[-1] if content else {}) | {"text": text + TAG}]
        return [*messages[:-1], last | {"content": parts}], text
    return [*messages[:-1], last | {"content": content + TAG}], content


def cut(rendered: str, text: str) -> str:
    """Returns the rendered prompt up to the end of the last message's ``text``. Raises ValueError if the
    template does not write this text.

    A template that trims the ends of a message trims the text here too: the model has seen it so.
    """
    before, found, after = rendered.rpartition(TAG[0])
    if not found or not before.endswith((text, text.lstrip())):
        raise ValueError(REWRITES)
    return before if after.startswith(TAG[1:]) else before.rstrip()
