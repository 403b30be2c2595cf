"""Log-probabilities in the two shapes of OpenAI's API."""

from collections.abc import Iterable, Sequence
from typing import Any

from jmoe.engine.request import TokenLogprob
from jmoe.engine.text.codec import TextCodec

LOWEST = -9999.0  # JSON has no minus infinity; OpenAI writes this


def token_name(token_id: int, codec: TextCodec | None) -> str:
    return f"token_id:{token_id}" if codec is None else codec.token_text(token_id)


def completion_logprobs(
    entries: Iterable[tuple[int, TokenLogprob | None]], codec: TextCodec | None, offsets: list[int]
) -> dict[str, list]:
    """The ``logprobs`` object of (token id, entry) pairs.

    offsets: character position in the text at which each token begins.
    A prompt's first token has no entry: its values are null.
    """
    names, values, tops = [], [], []
    for token_id, entry in entries:
        names.append(token_name(token_id, codec))
        values.append(None if entry is None else _finite(entry.logprob))
        tops.append(None if entry is None else _by_name(entry, codec))
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _by_name(entry: TokenLogprob, codec: TextCodec | None) -> dict[str, float]:
    """Log-probabilities of the alternatives by text, including the token itself with the same float.

    Two tokens may have the same text (halves of characters do). Evaluation harnesses compare the token with
    the largest value, so none may be lost: later tokens with the same text are named by their id.
    """
    named = {token_name(entry.token_id, codec): _finite(entry.logprob)}
    for token_id, logprob in entry.top:
        if token_id != entry.token_id:
            name = token_name(token_id, codec)
            named[f"token_id:{token_id}" if name in named else name] = _finite(logprob)
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def chat_logprobs(
    entries: Sequence[TokenLogprob], codec: TextCodec | None, alternatives: int
) -> list[dict[str, Any]]:
    """The ``logprobs.content`` list."""
    return [
        _chat_token(e.token_id, e.logprob, codec)
        | {"top_logprobs": [_chat_token(i, p, codec) for i, p in e.top[:alternatives]]}
        for e in entries
    ]


def _chat_token(token_id: int, logprob: float, codec: TextCodec | None) -> dict[str, Any]:
    """One entry; "bytes" are the token's own, also for a part of a character: joined they are the text's."""
    own = None if codec is None else list(codec.token_bytes(token_id))
    return {"token": token_name(token_id, codec), "logprob": _finite(logprob), "bytes": own}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
