"""The limits on an answer's tokens that its parameters set: allowed tokens and bad words."""

from collections.abc import Iterable, Sequence

import numpy as np

from jmoe.engine.request import MAX_BAD_SEQUENCES, TokenLimits
from jmoe.engine.text.codec import TextCodec


def token_limits(
    allowed: Sequence[int] | None, bad_words: Sequence[str], codec: TextCodec | None, vocab_size: int
) -> TokenLimits | None:
    """Returns the limits, or None if there are none. Raises ValueError if they cannot be kept.

    allowed: the only tokens that may be sampled; None allows all.
    """
    if allowed is None and not bad_words:
        return None
    outside = next((t for t in allowed or () if not 0 <= t < vocab_size), None)
    if outside is not None:
        raise ValueError(f"allowed_token_ids: {outside} is outside the vocabulary of {vocab_size}")
    if bad_words and codec is None:
        raise ValueError("bad_words need a tokenizer, which this model directory does not have")
    sequences = [] if codec is None else _sequences(bad_words, codec)
    several = tuple(each for each in sequences if len(each) > 1)
    if len(several) > MAX_BAD_SEQUENCES:
        raise ValueError(
            f"bad_words: {len(several)} sequences of several tokens, with and without a space in front of "
            f"each word, exceed the limit of {MAX_BAD_SEQUENCES}"
        )
    banned = [each[0] for each in sequences if len(each) == 1]
    mask_V = np.ones(vocab_size, bool) if allowed is None else _mask(allowed, vocab_size)
    mask_V[banned] = False
    if not mask_V.any():
        raise ValueError("bad_words forbid every token that allowed_token_ids allow")
    return TokenLimits(None if allowed is None and not banned else packed(mask_V), several)


def _sequences(bad_words: Iterable[str], codec: TextCodec) -> list[tuple[int, ...]]:
    """Returns the different token sequences of the words, without and with a space in front."""
    texts = [text for word in bad_words for text in (word.lstrip(), f" {word.lstrip()}")]
    try:
        encoded = [tuple(codec.encode(text, special=False)) for text in texts]
    except ValueError as error:
        raise ValueError(f"bad_words: {error}") from None
    return [*dict.fromkeys(ids for ids in encoded if ids)]


def _mask(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    mask_V = np.zeros(vocab_size, bool)
    mask_V[list(ids)] = True
    return mask_V


def packed(mask_V: np.ndarray) -> np.ndarray:
    """Returns the mask's bits as uint32 words: bit t % 32 of word t // 32 is that of token t."""
    padded = np.pad(mask_V, (0, -len(mask_V) % 32))
    return np.packbits(padded, bitorder="little").view(np.uint32)
