"""The oracle: causal attention of one sequence in plain numpy, one head after another."""

import numpy as np
from jaxtyping import Float

from jmoe_kernels.settings import Span


def attention_reference(
    q_THd: Float[np.ndarray, "T H d"],
    k_SGd: Float[np.ndarray, "S G d"],
    v_SGe: Float[np.ndarray, "S G e"],
    span: Span = Span(),
    sinks_H: Float[np.ndarray, " H"] | None = None,
) -> Float[np.ndarray, "T H e"]:
    """Attends to S keys without pages; the queries are those of the sequence's last T tokens.

    sinks_H: last score of each query head that has no value.

    It takes O(T * S) memory, so it is for tests only.
    """
    (t, h, d), (s, g, e) = q_THd.shape, v_SGe.shape
    query, key = np.arange(s - t, s)[:, None], np.arange(s)[None]
    mask = key <= query
    if span.window is not None:
        mask &= query - key < span.window
    if span.chunk is not None:
        mask &= query // span.chunk == key // span.chunk
    out = np.zeros((t, h, e), q_THd.dtype)
    for i in range(h):
        scores = np.where(mask, q_THd[:, i] @ k_SGd[:, i // (h // g)].T / np.sqrt(d), -np.inf)
        if sinks_H is not None:
            scores = np.concatenate([scores, np.full((t, 1), sinks_H[i])], axis=1)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out[:, i] = p[:, :s] @ v_SGe[:, i // (h // g)]
    return out
