"""The dense oracle: every token through every expert, in numpy, weighted by the routing."""

import numpy as np


def moe_reference(
    x_TD: np.ndarray,
    gate_ED: np.ndarray,
    gate_up_E2FD: np.ndarray,
    down_EDF: np.ndarray,
    k: int,
    *,
    renormalize: bool,
    valid_T: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the ``[T, D]`` float64 output of a MoE layer; ties in the router go to the lower expert id."""
    x = x_TD.astype(np.float64)
    logits_TE = x @ gate_ED.astype(np.float64).T
    scores_TE = np.exp(logits_TE - logits_TE.max(-1, keepdims=True))
    scores_TE /= scores_TE.sum(-1, keepdims=True)
    ids_TK = np.argsort(-scores_TE, axis=-1, kind="stable")[:, :k]
    weights_TK = np.take_along_axis(scores_TE, ids_TK, axis=-1)
    if renormalize:
        weights_TK /= weights_TK.sum(-1, keepdims=True)
    y = np.zeros_like(x)
    for e, ((gate, up), down) in enumerate(zip(gate_up_E2FD, down_EDF, strict=True)):
        h = x @ gate.astype(np.float64).T
        h = h / (1 + np.exp(-h)) * (x @ up.astype(np.float64).T)
        share_T = np.where(ids_TK == e, weights_TK, 0.0).sum(-1, keepdims=True)
        y += share_T * (h @ down.astype(np.float64).T)
    return y if valid_T is None else np.where(valid_T[:, None], y, 0.0)
