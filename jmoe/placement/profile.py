"""Routing statistics of a model on some text: what ``jmoe profile`` writes and the offline methods read.

``Profile`` -> ``profile.npz`` -> expert grouping (``jmoe.placement.group``) with token tables, and the store
of expert maps. This is host code in numpy. A profile's size does not grow with the text: counts are by
distinct (layer, token id, expert), and the data of single requests is a sample of bounded size
(``profile_builder``). Expert ids are the checkpoint's.

Axes here: L MoE layers, V token ids, X distinct (layer, token id, expert), Q sampled requests (windows of
text), P positions of a request's trace, M iterations of a request.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int

from jmoe.placement.npz import save_arrays, saved_arrays

FORMAT = "jmoe profile 2"


@dataclass(frozen=True, eq=False)
class RequestSample:
    """A uniform sample of the requests that were profiled.

    experts_QLE: how often each expert was chosen.
    gates_QLE: mean of the router's scores, float16.
    embeddings_QD: mean of the input embeddings, float16.
    tokens_QP: token ids of a contiguous piece of the request (its trace), -1 after its end.
    ids_QPLK: chosen experts of each token of the trace.
    weights_QPLK: weights of these experts.
    maps_QMLE: gate distributions at random single positions, each the iteration of one token, float16.
    map_tokens_QM: token id at each of these positions, -1 if the request has fewer.
    """

    experts_QLE: Int[np.ndarray, "Q L E"]
    gates_QLE: Float[np.ndarray, "Q L E"]
    embeddings_QD: Float[np.ndarray, "Q D"]
    tokens_QP: Int[np.ndarray, "Q P"]
    ids_QPLK: Int[np.ndarray, "Q P L K"]
    weights_QPLK: Float[np.ndarray, "Q P L K"]
    maps_QMLE: Float[np.ndarray, "Q M L E"]
    map_tokens_QM: Int[np.ndarray, "Q M"]


@dataclass(frozen=True, eq=False)
class Profile:
    """The choices of the routers of ``model`` on a text; all counts are int64.

    model: identity of the model (``jmoe.checkpoint.identity``).
    tokens: number of tokens counted.
    k: experts per token.
    frequency_V: occurrences of each token id.
    pairs_X: flat index ``(layer * V + token id) * E + expert`` of each choice that occurred, ascending.
    counts_X: how often the token id chose the expert at the layer.
    together_LEE: tokens that chose both experts at one layer; the diagonal is the experts' load.
    following_LEE: tokens that chose one expert at layer l and the other at l + 1, over all k x k pairs; it
        has one layer fewer.
    nearest_V: for each token id, the seen id with the most similar input embedding (itself if seen).
    sample: sample of the requests.

    Raises ValueError if the arrays do not fit one another.
    """

    model: str
    tokens: int
    k: int
    frequency_V: Int[np.ndarray, " V"]
    pairs_X: Int[np.ndarray, " X"]
    counts_X: Int[np.ndarray, " X"]
    together_LEE: Int[np.ndarray, "L E E"]
    following_LEE: Int[np.ndarray, "L-1 E E"]
    nearest_V: Int[np.ndarray, " V"]
    sample: RequestSample

    def __post_init__(self) -> None:
        sample, (requests, places) = self.sample, self.sample.tokens_QP.shape
        experts, layers = self.experts, self.layers
        shapes = {
            "nearest": (self.nearest_V, (self.vocab,)),
            "counts": (self.counts_X, self.pairs_X.shape),
            "together": (self.together_LEE, (layers, experts, experts)),
            "following": (self.following_LEE, (layers - 1, experts, experts)),
            "sampled experts": (sample.experts_QLE, (requests, layers, experts)),
            "sampled gates": (sample.gates_QLE, (requests, layers, experts)),
            "sampled embeddings": (sample.embeddings_QD, (requests, *sample.embeddings_QD.shape[1:2])),
            "trace ids": (sample.ids_QPLK, (requests, places, layers, self.k)),
            "trace weights": (sample.weights_QPLK, (requests, places, layers, self.k)),
            "maps": (sample.maps_QMLE, (*sample.map_tokens_QM.shape, layers, experts)),
            "map tokens": (sample.map_tokens_QM, (requests, *sample.map_tokens_QM.shape[1:2])),
        }
        for name, (array, expected) in shapes.items():
            if array.shape != expected:
                raise ValueError(f"{name} must be {list(expected)}, it is {list(array.shape)}")
        limits = {
            "pairs": (self.pairs_X, layers * self.vocab * experts),
            "nearest": (self.nearest_V, self.vocab),
            "trace ids": (sample.ids_QPLK, experts),
            "map tokens": (np.maximum(sample.map_tokens_QM, 0), self.vocab),
        }
        for name, (array, limit) in limits.items():
            if array.size and not 0 <= array.min() <= array.max() < limit:
                raise ValueError(f"{name} must be from 0 to {limit - 1}")
        shares = {
            "sampled gates": sample.gates_QLE,
            "sampled embeddings": sample.embeddings_QD,
            "trace weights": sample.weights_QPLK,
            "maps": sample.maps_QMLE,
        }
        for name, array in shares.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite numbers")
        if np.any(np.diff(self.pairs_X) <= 0):
            raise ValueError("pairs must ascend")

    @property
    def layers(self) -> int:
        return self.together_LEE.shape[0]

    @property
    def experts(self) -> int:
        return self.together_LEE.shape[-1]

    @property
    def vocab(self) -> int:
        return len(self.frequency_V)

    @property
    def loads_LE(self) -> Int[np.ndarray, "L E"]:
        """The number of times that each expert was chosen."""
        return np.diagonal(self.together_LEE, axis1=1, axis2=2)

    def chosen(self, layer: int, tokens_T: Int[np.ndarray, " T"]) -> Int[np.ndarray, "T E"]:
        """Returns how often each of ``tokens_T``, distinct ascending token ids, chose each expert at
        ``layer``."""
        width = self.vocab * self.experts
        first, last = np.searchsorted(self.pairs_X, [layer * width, (layer + 1) * width])
        token_X, expert_X = np.divmod(self.pairs_X[first:last] - layer * width, self.experts)
        row_X = np.searchsorted(tokens_T, token_X)
        asked_X = np.append(tokens_T, -1)[row_X] == token_X
        chosen_TE = np.zeros((len(tokens_T), self.experts), np.int64)
        chosen_TE[row_X[asked_X], expert_X[asked_X]] = self.counts_X[first:last][asked_X]
        return chosen_TE

    def save(self, path: Path) -> None:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sample"}
        sample = {f"sample_{f.name}": getattr(self.sample, f.name) for f in fields(self.sample)}
        save_arrays(path, FORMAT, own | sample)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Loads what ``save`` wrote; raises a ValueError that names the file if it is absent, malformed or of
        another kind."""
        with saved_arrays(path, "profile", FORMAT) as arrays:
            sample = RequestSample(**{f.name: arrays[f"sample_{f.name}"] for f in fields(RequestSample)})
            own: dict[str, Any] = {f.name: arrays[f.name] for f in fields(cls) if f.name != "sample"}
            own |= {"model": str(own["model"]), "tokens": int(own["tokens"]), "k": int(own["k"])}
            return cls(**own, sample=sample)
