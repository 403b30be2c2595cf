"""Penalties of repeated tokens, token by token."""

import numpy as np

from jmoe.engine.request import SamplingParams


def restated(logits: np.ndarray, prompt: list[int], answer: list[int], params: SamplingParams) -> np.ndarray:
    """Returns one row's logits ``[V]`` with penalties, in float64."""
    out = logits.astype(np.float64)
    for token in {*prompt, *answer}:
        r = params.repetition_penalty
        out[token] = out[token] / r if out[token] > 0 else out[token] * r
    for token in set(answer):
        out[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    return out
