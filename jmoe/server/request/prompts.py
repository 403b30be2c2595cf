"""Prompts as token ids: from text, token ids or chat messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jmoe.engine.text.codec import TextCodec
from jmoe.engine.text.token_bytes import GrowingText
from jmoe.server.errors import ApiError, invalid, refused
from jmoe.server.request.messages import needs_forms, template_message
from jmoe.server.request.schema import MAX_CHOICES, Message
from jmoe.server.template.chat_template import ChatTemplate


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    token_ids: tokens of the prompt.
    text: text of the prompt; empty if it was sent as token ids and is not echoed.
    shows_special: whether the text contains every special token, as the text decoded from token ids does.
    """

    token_ids: list[int]
    text: str = ""
    shows_special: bool = False

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
        return [prompt_of_ids(prompt, encoder.codec, echo)]  # type: ignore[arg-type]
    if len(prompt) > MAX_CHOICES:
        raise invalid(f"prompt holds {len(prompt)} prompts; the limit is {MAX_CHOICES}", "prompt")
    if kinds == {str}:
        return [_from_text(item, encoder) for item in prompt]  # type: ignore[arg-type]
    return [prompt_of_ids(item, encoder.codec, echo) for item in prompt]  # type: ignore[arg-type]


def _from_text(text: str, encoder: TextEncoder) -> Prompt:
    ids = encoder.encode(text, "prompt")
    if not text or not ids:  # a BOS alone is no prompt
        raise invalid("prompt must not be empty", "prompt")
    return Prompt(ids, text)


def prompt_of_ids(ids: list[int], codec: TextCodec | None, echo: bool) -> Prompt:
    """Returns token ids as they are: no BOS is added (evaluation harnesses send their own)."""
    if not ids:
        raise invalid("prompt must not be empty", "prompt")
    small = all(0 <= t < 2**31 for t in ids)  # the engine names the bad id; the tokenizer cannot take it
    try:
        text = codec.decode(ids, skip_special=False) if echo and codec is not None and small else ""
    except ValueError as error:
        raise refused(error, "prompt") from None
    return Prompt(ids, text, shows_special=True)


def chat_prompt(
    messages: list[Message],
    template: ChatTemplate | None,
    encoder: TextEncoder,
    tools: list[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> Prompt:
    """Returns the rendered conversation. The template writes the special tokens itself, so ``encoder``
    usually adds none.

    tools: tools that the template writes.
    variables: other variables of the template.
    """
    if template is None:
        raise ApiError(
            400,
            "this model directory has no chat template; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    forms = template.chosen(tools).forms if needs_forms(messages) else None
    plain = [template_message(i, message, forms) for i, message in enumerate(messages)]
    try:
        text = template.render(plain, tools, variables)
    except ValueError as error:
        raise invalid(str(error), "messages") from None
    return Prompt(encoder.encode(text, "messages"), text)
