"""``ProfileBuilder``: requests one by one -> ``Profile``, in memory independent of the text's length.

Counts of (layer, token id, expert) are buffered and merged into a sorted table of the distinct ones. Requests
and their traces are kept in a reservoir: every request is in it with the same probability (Vitter's
algorithm R), decided by the seed.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from jmoe.placement.profile import Profile, RequestSample

BUFFERED = 1 << 20  # assignments that wait to be merged, 8 bytes each
BLOCK = 1 << 22  # similarities computed at once, 4 bytes each


@dataclass(frozen=True)
class RoutedRequest:
    """One window of N tokens and its routing.

    tokens_N: token ids.
    ids_LNK: chosen experts.
    weights_LNK: combine weights of these experts.
    gates_LE: mean router scores.
    embedding_D: mean input embedding.
    maps_MLE: router scores at M random positions; M is the same for all requests.
    map_tokens_M: token ids at these positions, -1 for none.
    """

    tokens_N: Int[np.ndarray, " N"]
    ids_LNK: Int[np.ndarray, "L N K"]
    weights_LNK: Float[np.ndarray, "L N K"]
    gates_LE: Float[np.ndarray, "L E"]
    embedding_D: Float[np.ndarray, " D"]
    maps_MLE: Float[np.ndarray, "M L E"]
    map_tokens_M: Int[np.ndarray, " M"]

    @property
    def is_finite(self) -> bool:
        """Whether all measured values are finite. Maps without a position are not checked."""
        maps_XLE = self.maps_MLE[self.map_tokens_M >= 0]
        measured = self.weights_LNK, self.gates_LE, self.embedding_D, maps_XLE
        return all(bool(np.isfinite(each).all()) for each in measured)


class ProfileBuilder:
    """Takes routed requests and makes their ``Profile``.

    sample_size: number of requests kept as the sample.
    trace_length: number of tokens kept of each.
    num_overflows: number of requests left out because the model's activations overflowed, which makes their
        routers' choices meaningless.
    """

    def __init__(
        self, *, layers: int, experts: int, k: int, vocab: int,
        sample_size: int = 1024, trace_length: int = 32, seed: int = 0,
    ):  # fmt: skip
        self.experts, self.k, self.trace_length = experts, k, trace_length
        self.tokens = self.num_overflows = 0
        self._rng = np.random.default_rng(seed)
        self._sample_size, self._num_requests = sample_size, 0
        self._sample_rows: list[dict[str, np.ndarray]] = []
        self._frequency_V = np.zeros(vocab, np.int64)
        self._together_LEE = np.zeros((layers, experts, experts), np.int64)
        self._following_LEE = np.zeros((layers - 1, experts, experts), np.int64)
        self._pairs_X, self._counts_X = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._pending: list[np.ndarray] = []
        self._pending_size = 0

    def add(self, request: RoutedRequest) -> None:
        if not request.is_finite:
            self.num_overflows += 1
            return
        tokens_N, ids_LNK = request.tokens_N, request.ids_LNK.astype(np.int64)
        layers, n, _ = ids_LNK.shape
        vocab = len(self._frequency_V)
        self.tokens += n
        self._frequency_V += np.bincount(tokens_N, minlength=vocab)
        self._add_pairs(
            (((np.arange(layers)[:, None] * vocab + tokens_N) * self.experts)[..., None] + ids_LNK).ravel()
        )
        chosen_LNE = np.zeros((layers, n, self.experts), np.float32)  # sums of ones stay exact below 2^24
        np.put_along_axis(chosen_LNE, ids_LNK, 1, axis=2)
        from_LEN = chosen_LNE.transpose(0, 2, 1)
        self._together_LEE += (from_LEN @ chosen_LNE).astype(np.int64)
        self._following_LEE += (from_LEN[:-1] @ chosen_LNE[1:]).astype(np.int64)
        self._sample(request, chosen_LNE.sum(1))

    def finish(self, model: str, nearest_V: Int[np.ndarray, " V"]) -> Profile:
        """Makes the profile of ``model``; raises ValueError if nothing was added.

        nearest_V: see ``nearest_seen``.
        """
        if not self._sample_rows:
            raise ValueError("a profile needs at least one request")
        self._merge()
        sample = RequestSample(
            **{name: np.stack([kept[name] for kept in self._sample_rows]) for name in self._sample_rows[0]}
        )
        return Profile(
            model, self.tokens, self.k, self._frequency_V, self._pairs_X, self._counts_X,
            self._together_LEE, self._following_LEE, nearest_V, sample,
        )  # fmt: skip

    @property
    def seen_V(self) -> np.ndarray:
        """Whether each token id occurred."""
        return self._frequency_V > 0

    def _add_pairs(self, pairs: Int[np.ndarray, " pairs"]) -> None:
        self._pending.append(pairs)
        self._pending_size += len(pairs)
        if self._pending_size >= BUFFERED:
            self._merge()

    def _merge(self) -> None:
        new_X, new_counts_X = np.unique(
            np.concatenate([*self._pending, self._pairs_X[:0]]), return_counts=True
        )
        pairs_X, place = np.unique(np.concatenate([self._pairs_X, new_X]), return_inverse=True)
        counts = np.concatenate([self._counts_X, new_counts_X])
        self._pairs_X, self._counts_X = pairs_X, np.zeros(len(pairs_X), np.int64)
        np.add.at(self._counts_X, place, counts)
        self._pending, self._pending_size = [], 0

    def _sample(self, request: RoutedRequest, experts_LE: np.ndarray) -> None:
        place = len(self._sample_rows)
        if place == self._sample_size:
            place = int(self._rng.integers(self._num_requests + 1))
        self._num_requests += 1
        if place >= self._sample_size:
            return
        start = int(self._rng.integers(max(1, len(request.tokens_N) - self.trace_length + 1)))
        piece = slice(start, start + self.trace_length)
        tokens_P = np.full(self.trace_length, -1, np.int32)
        tokens_P[: len(request.tokens_N[piece])] = request.tokens_N[piece]
        kept = {
            "experts_QLE": experts_LE.astype(np.int32),
            "gates_QLE": _half(request.gates_LE),
            "embeddings_QD": _half(request.embedding_D),
            "tokens_QP": tokens_P,
            "ids_QPLK": self._piece(request.ids_LNK[:, piece], np.int16),
            "weights_QPLK": self._piece(_half(request.weights_LNK[:, piece]), np.float16),
            "maps_QMLE": _half(np.where((request.map_tokens_M >= 0)[:, None, None], request.maps_MLE, 0)),
            "map_tokens_QM": request.map_tokens_M.astype(np.int32),
        }
        self._sample_rows[place : place + 1] = [kept]

    def _piece(self, values_LNK: np.ndarray, dtype: type) -> np.ndarray:
        """Returns the values as ``[P, L, K]``, zero after the end of the request."""
        layers, n, k = values_LNK.shape
        piece_PLK = np.zeros((self.trace_length, layers, k), dtype)
        piece_PLK[:n] = values_LNK.transpose(1, 0, 2)
        return piece_PLK


def _half(values_Z: Float[np.ndarray, "*Z"]) -> Float[np.ndarray, "*Z"]:
    """Returns the values in float16; larger ones are clipped to its largest number."""
    most = np.finfo(np.float16).max
    return np.clip(values_Z, -most, most).astype(np.float16)


def nearest_seen(embeddings_VD: Float[np.ndarray, "V D"], seen_V: np.ndarray) -> Int[np.ndarray, " V"]:
    """Returns for each token id the seen id with the highest cosine of input embeddings; a seen id has
    itself.

    Paper: an unseen token copies the row of its nearest neighbour in embedding space. The cosine as the
    measure is our choice.
    """
    unit_VD = embeddings_VD / np.maximum(np.linalg.norm(embeddings_VD, axis=1, keepdims=True), 1e-30)
    seen = np.flatnonzero(seen_V)
    nearest_V = np.arange(len(seen_V), dtype=np.int32)
    unseen, step = np.flatnonzero(~seen_V), max(1, BLOCK // max(1, len(seen)))
    for start in range(0, len(unseen), step):
        rows = unseen[start : start + step]
        nearest_V[rows] = seen[np.argmax(unit_VD[rows] @ unit_VD[seen].T, axis=1)]
    return nearest_V
