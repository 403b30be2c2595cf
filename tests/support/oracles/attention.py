"""Causal attention in plain numpy."""

import numpy as np
from jmoe_kernels.paged_attention import Span


def by_numpy(q, k, v, span: Span = Span(), sinks=None):
    """[T, H, e] causal attention of one sequence, whose last T tokens are the queries.

    k: [S, G, d]; v: [S, G, e]; sinks: [H], a last score of each query that has no value.
    """
    (t, h, d), (s, g, e) = q.shape, v.shape
    query, key = np.arange(s - t, s)[:, None], np.arange(s)[None]
    seen = key <= query
    if span.window is not None:
        seen &= query - key < span.window
    if span.chunk is not None:
        seen &= query // span.chunk == key // span.chunk
    out = np.zeros((t, h, e), q.dtype)
    for i in range(h):
        scores = np.where(seen, q[:, i] @ k[:, i // (h // g)].T / np.sqrt(d), -np.inf)
        if sinks is not None:
            scores = np.concatenate([scores, np.full((t, 1), sinks[i])], axis=1)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out[:, i] = p[:, :s] @ v[:, i // (h // g)]
    return out
