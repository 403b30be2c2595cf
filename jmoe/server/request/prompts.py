"""Prompts as token ids: from text, token ids or chat messages."""

from dataclasses import dataclass

from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.markup import PLAIN, Markup
from jmoe.engine.text.token_bytes import GrowingText
from jmoe.server.errors import ApiError, invalid, refused
from jmoe.server.request.checks import CheckedChat
from jmoe.server.request.conversation.chat_model import ChatModel
from jmoe.server.request.conversation.final_message import cut, tagged
from jmoe.server.request.conversation.literals import Given
from jmoe.server.request.conversation.messages import template_message
from jmoe.server.request.conversation.results import in_order
from jmoe.server.request.conversation.turns import fitted
from jmoe.server.request.schema import MAX_CHOICES, ChatRequest
from jmoe.server.template.chat_template import ChatTemplate


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    token_ids: tokens of the prompt.
    text: text of the prompt; empty if it was sent as token ids and is not echoed.
    shows_special: whether the text contains every special token, as the text decoded from token ids does.
    markup: marks by which the text of the answer is divided.
    """

    token_ids: list[int]
    text: str = ""
    shows_special: bool = False
    markup: Markup = PLAIN

    def offsets(self, codec: TextCodec) -> list[int]:
        """Returns the character of the text at which each token begins; a token not in the text has no
        length."""
        text, offsets, at = GrowingText(codec.token_bytes, (), shows_special=True), [], 0
        for token in self.token_ids:
            offsets.append(at)
            is_special = token in codec.token_bytes.special_ids
            if not is_special or self.shows_special or self.text.startswith(codec.token_text(token), at):
                at += len(text.push(token))
        if self.shows_special or at == len(self.text):
            return offsets
        starts = codec.token_starts(self.text)  # the tokenizer does not keep every character of a text
        return starts if len(starts) == len(offsets) else codec.token_starts(self.text, special=False)


@dataclass(frozen=True)
class TextEncoder:
    """The way in which the text of prompts becomes tokens.

    codec: text codec of the model; None = the model has no tokenizer.
    adds_special: whether the tokenizer's special tokens are added.
    limit: context length of the model in tokens, so that a text that cannot fit is refused by its length;
        None = any length.
    """

    codec: TextCodec | None
    adds_special: bool
    limit: int | None = None

    def encode(self, text: str, param: str) -> list[int]:
        """Returns the text's token ids.

        param: request field named in the error if the text is refused.
        """
        if self.codec is None:
            message = "this model has no tokenizer: give the prompt as token ids to /v1/completions"
            raise invalid(message, param)
        try:
            limit = {} if self.limit is None else {"limit": self.limit}
            return self.codec.encode(text, special=self.adds_special, **limit)
        except ValueError as error:
            raise refused(error, param) from None


def completion_prompts(
    prompt: str | list[str | int | list[int]], encoder: TextEncoder, *, echo: bool
) -> list[Prompt]:
    """Makes one prompt or several from a text, a list of texts, token ids or a list of token-id lists."""
    if isinstance(prompt, str):
        return [_from_text(prompt, encoder)]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise invalid("prompt must not mix strings, token ids and lists", "prompt")
    if not kinds:
        raise invalid("prompt must not be empty", "prompt")
    if kinds == {int}:
        return [_from_ids(prompt, encoder.codec, echo)]  # type: ignore[arg-type]
    if len(prompt) > MAX_CHOICES:
        raise invalid(f"prompt holds {len(prompt)} prompts; the limit is {MAX_CHOICES}", "prompt")
    if kinds == {str}:
        return [_from_text(item, encoder) for item in prompt]  # type: ignore[arg-type]
    return [_from_ids(item, encoder.codec, echo) for item in prompt]  # type: ignore[arg-type]


def _from_text(text: str, encoder: TextEncoder) -> Prompt:
    ids = encoder.encode(text, "prompt")
    if not text or not ids:  # a BOS alone is no prompt
        raise invalid("prompt must not be empty", "prompt")
    return Prompt(ids, text)


def _from_ids(ids: list[int], codec: TextCodec | None, echo: bool) -> Prompt:
    """Returns token ids as they are: no BOS is added (evaluation harnesses send their own)."""
    if not ids:
        raise invalid("prompt must not be empty", "prompt")
    small = all(0 <= t < 2**31 for t in ids)  # the engine names the bad id; the tokenizer cannot take it
    try:
        text = codec.decode(ids, skip_special=False) if echo and codec is not None and small else ""
    except ValueError as error:
        raise refused(error, "prompt") from None
    return Prompt(ids, text, shows_special=True)


def chat_prompt(chat: CheckedChat, model: ChatModel, encoder: TextEncoder) -> Prompt:
    """Returns the rendered conversation. The template writes the special tokens itself, so ``encoder``
    usually adds none. A 400 says why the conversation has no prompt."""
    template = model.template
    if template is None:
        raise ApiError(
            400,
            "this model directory has no chat template; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    tools = None if chat.tools is None else chat.tools.definitions
    template = template.chosen(tools)
    body, forms = chat.body, template.forms
    plain = [template_message(i, body.messages[i], forms) for i in in_order(body.messages)]
    variables = template.thinking.variables(_is_thinking(body), body.reasoning_effort)
    given = Given(fitted(plain, forms.turns), tools, variables | (body.chat_template_kwargs or {}))
    try:
        return _rendered(chat, model, template, given, encoder)
    except ValueError as error:
        raise refused(error, "messages") from None


def _rendered(
    chat: CheckedChat, model: ChatModel, template: ChatTemplate, given: Given, encoder: TextEncoder
) -> Prompt:
    """Renders what the template is given, and encodes it. Raises ValueError."""
    literals = model.literals(template)
    protected = None if literals is None else literals.protected(given)
    shown, is_continued, begun = protected or given, bool(chat.body.continue_final_message), ""
    messages = shown.messages
    if is_continued:
        messages, begun = tagged(messages)
    opens_answer = not is_continued and chat.body.add_generation_prompt is not False
    text = template.render(messages, shown.tools, shown.variables, opens_answer=opens_answer)
    if is_continued:
        text = cut(text, begun)
    thinking = template.thinking
    markup = model.markup(chat.tools, thinking, is_inside=thinking.is_inside(text, begun))
    if protected is None or literals is None:
        return Prompt(encoder.encode(text, "messages"), text, markup=markup)
    ids = literals.encode(text, adds_special=encoder.adds_special, limit=encoder.limit)
    return Prompt(ids, literals.restored(text), markup=markup)


def _is_thinking(body: ChatRequest) -> bool | None:
    """Returns whether the request wants thoughts; None if it does not say."""
    if body.enable_thinking is not None:
        return body.enable_thinking
    if isinstance(body.thinking, bool) or body.thinking is None:
        return body.thinking
    return {"enabled": True, "disabled": False, "adaptive": None}[body.thinking.type]
