"""Log-probabilities in the two shapes of OpenAI's API."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from jmoe.engine.request import TokenLogprob
from jmoe.engine.text.codec import TextCodec
from jmoe.server.answer.replies import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    TopLogprob,
)

LOWEST = -9999.0  # JSON has no minus infinity; OpenAI writes this


def token_name(token_id: int, codec: TextCodec | None) -> str:
    return f"token_id:{token_id}" if codec is None else codec.token_text(token_id)


def completion_logprobs(
    entries: Iterable[tuple[int, TokenLogprob | None]], codec: TextCodec | None, offsets: list[int]
) -> CompletionLogprobs:
    """Returns the ``logprobs`` object of (token id, entry) pairs.

    A prompt's first token has no entry: its values are null.

    offsets: character position in the text at which each token begins.
    """
    answer = CompletionLogprobs([], [], [], offsets)
    for token_id, entry in entries:
        answer.tokens.append(token_name(token_id, codec))
        answer.token_logprobs.append(None if entry is None else _finite(entry.logprob))
        answer.top_logprobs.append(None if entry is None else _top_logprobs(entry, codec))
    return answer


def _top_logprobs(entry: TokenLogprob, codec: TextCodec | None) -> dict[str, float]:
    """Returns the log-probabilities of the alternatives by text, including the token itself with the same
    float.

    Two tokens may have the same text (halves of characters do). Evaluation harnesses compare the token with
    the largest value, so none may be lost: later tokens with the same text are named by their id.
    """
    values = {token_name(entry.token_id, codec): _finite(entry.logprob)}
    for token_id, logprob in entry.top:
        if token_id != entry.token_id:
            name = token_name(token_id, codec)
            values[f"token_id:{token_id}" if name in values else name] = _finite(logprob)
    return dict(sorted(values.items(), key=lambda item: -item[1]))


def prompt_logprobs(
    scores: Sequence[TokenLogprob | None], codec: TextCodec | None, alternatives: int
) -> list[dict[str, PromptLogprob] | None]:
    """Returns the log-probabilities of a prompt in vLLM's form: for each token an object by token id, the
    token itself first."""
    return [None if entry is None else _by_id(entry, codec, alternatives) for entry in scores]


def _by_id(entry: TokenLogprob, codec: TextCodec | None, alternatives: int) -> dict[str, PromptLogprob]:
    own = [(entry.token_id, entry.logprob, entry.rank)]
    top = ((id, logprob, i + 1) for i, (id, logprob) in enumerate(entry.top[:alternatives]))
    every = [*own, *(each for each in top if each[0] != entry.token_id)]
    return {str(id): PromptLogprob(_finite(p), rank, token_name(id, codec)) for id, p, rank in every}


def with_alternatives(entry: TokenLogprob | None, count: int) -> TokenLogprob | None:
    """Returns the entry with no more than ``count`` alternatives, and the token itself."""
    if entry is None:
        return None
    top, own = entry.top[:count], (entry.token_id, entry.logprob)
    return replace(entry, top=top if entry.token_id in dict(top) else (*top, own))


def chat_logprobs(
    entries: Sequence[TokenLogprob], codec: TextCodec | None, alternatives: int
) -> ChatLogprobs:
    """Returns the ``logprobs`` object. "bytes" are a token's own, also for a part of a character: joined they
    are the text's."""
    content = []
    for entry in entries:
        tops = [TopLogprob(*_token(token_id, p, codec)) for token_id, p in entry.top[:alternatives]]
        content.append(ChatLogprob(*_token(entry.token_id, entry.logprob, codec), tops))
    return ChatLogprobs(content, None)


def _token(token_id: int, logprob: float, codec: TextCodec | None) -> tuple[str, float, list[int] | None]:
    """Returns the token's text, its log-probability and its bytes."""
    token_bytes = None if codec is None else list(codec.token_bytes(token_id))
    return token_name(token_id, codec), _finite(logprob), token_bytes


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
