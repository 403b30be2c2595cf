"""A profile and a placement -> the tables that put tokens where their experts are.

Speculative MoE: token id -> rank, and ranks at the last two layers -> rank. What the paper leaves open,
decided here:
* a token's rank is the rank with the most of its expected activations, and its confidence is that share
  (exact for fixed experts, and comparable between the two tables); the requests it occurred in do not count;
* expected shares of a token id are smoothed with ``PRIOR`` occurrences of the average token; without that,
  every id that was seen once would be certain;
* for the history, a token has one label per layer: the rank with most of its top-k, ties by combine weight;
* chunks are made equal by deferred acceptance: tokens apply to their best rank, a full rank keeps the most
  confident ones, the others apply to their next best.
"""

import numpy as np
from jaxtyping import Float, Int

from jmoe.placement.profile import Profile
from jmoe.placement.tables import Tables

PRIOR = 1.0
LARGEST = 64 << 20  # bytes of the shares of all ranks; a larger array is left out of the tables


def tabulate(profile: Profile, home_LE: Int[np.ndarray, "L E"], ranks: int) -> Tables:
    """Makes the tables for experts on the ranks of ``home_LE``. An unseen id has the row of its nearest seen
    id."""
    share_LVR = np.stack(
        [token_shares(profile, layer, home_E, ranks) for layer, home_E in enumerate(home_LE)]
    )
    by_token = _table(share_LVR[:, profile.nearest_V])
    return Tables(*by_token, *_table(history_shares(profile, home_LE, ranks)))


def _table(share_LXR: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns the best rank of each row, its share, and all shares unless they are large."""
    whole = share_LXR.astype(np.float16) if 2 * share_LXR.size <= LARGEST else None
    return share_LXR.argmax(2).astype(np.int16), share_LXR.max(2).astype(np.float16), whole


def token_shares(
    profile: Profile, layer: int, home_E: Int[np.ndarray, " E"], ranks: int
) -> Float[np.ndarray, "V R"]:
    """Returns the share of each token id's activations expected on each rank; an unseen id has the average
    share."""
    seen = np.flatnonzero(profile.frequency_V)
    on_rank_ER = np.eye(ranks)[home_E]
    average_R = on_rank_ER.T @ (profile.loads_LE[layer] / profile.loads_LE[layer].sum())
    share_VR = np.tile(average_R, (profile.vocab, 1)).astype(np.float32)
    chosen_TR = profile.chosen(layer, seen) @ on_rank_ER
    smoothed_TR = chosen_TR + PRIOR * profile.k * average_R
    share_VR[seen] = smoothed_TR / smoothed_TR.sum(1, keepdims=True)
    return share_VR


def labels(
    ids_NK: Int[np.ndarray, "N K"], weights_NK: Float[np.ndarray, "N K"], home_E: np.ndarray, ranks: int
) -> Int[np.ndarray, " N"]:
    """Returns the rank with most of each token's experts; ties are decided by their summed weight."""
    return rank_shares(ids_NK, home_E, ranks, 1 + 1e-3 * weights_NK.astype(np.float64)).argmax(1)


def rank_shares(
    ids_NK: Int[np.ndarray, "N K"], home_E: np.ndarray, ranks: int, weights_NK: np.ndarray | None = None
) -> Float[np.ndarray, "N R"]:
    """Returns the sum of ``weights_NK`` on each rank; by default it is the share of each token's
    activations."""
    tokens, k = ids_NK.shape
    where = np.arange(tokens)[:, None] * ranks + home_E[ids_NK]
    weights = np.full(where.shape, 1 / k) if weights_NK is None else weights_NK
    return np.bincount(where.ravel(), weights.ravel(), tokens * ranks).reshape(tokens, ranks)


def history_shares(
    profile: Profile, home_LE: Int[np.ndarray, "L E"], ranks: int
) -> Float[np.ndarray, "L H R"]:
    """Returns the shares of a token's activations on each rank by its labels at the two layers before, from
    the sample's traces.

    They are zero for a history that did not occur, as at the first two layers.
    """
    sample = profile.sample
    real_QP = sample.tokens_QP >= 0
    ids_NLK, weights_NLK = sample.ids_QPLK[real_QP], sample.weights_QPLK[real_QP]
    label_LN = [labels(ids_NLK[:, i], weights_NLK[:, i], home_E, ranks) for i, home_E in enumerate(home_LE)]
    share_LHR = np.zeros((len(home_LE), ranks * ranks, ranks), np.float32)
    for layer in range(2, len(home_LE)):
        history_N = label_LN[layer - 2] * ranks + label_LN[layer - 1]
        share_NR = rank_shares(ids_NLK[:, layer], home_LE[layer], ranks)
        np.add.at(share_LHR[layer], history_N, share_NR)
        seen = np.flatnonzero(np.bincount(history_N, minlength=ranks * ranks))
        smoothed = share_LHR[layer, seen] + PRIOR * share_NR.mean(0)
        share_LHR[layer, seen] = smoothed / smoothed.sum(1, keepdims=True)
    return share_LHR


def put(score_NR: Float[np.ndarray, "N R"]) -> Int[np.ndarray, " N"]:
    """Chooses a rank for each of N tokens by deferred acceptance, at most ceil(N / R) on each."""
    tokens, ranks = score_NR.shape
    room, rows = -(-tokens // ranks), np.arange(tokens)
    order_NR = np.argsort(-score_NR, axis=1, kind="stable")
    asked_N = np.zeros(tokens, np.int64)
    while True:
        rank_N = order_NR[rows, asked_N]
        full = np.flatnonzero(np.bincount(rank_N, minlength=ranks) > room)
        if not len(full):
            return rank_N
        for rank in full:
            mine = np.flatnonzero(rank_N == rank)
            asked_N[mine[np.argsort(-score_NR[mine, rank], kind="stable")[room:]]] += 1
