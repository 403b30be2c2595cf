"""Made-up routing with a structure that a solver should find."""

import numpy as np

from jmoe.placement.profile import Profile
from jmoe.placement.profile_builder import ProfileBuilder, RoutedRequest, nearest_seen

LAYERS, VOCAB, K, D = 3, 40, 2, 4
MAPS = 2  # iterations of a request that are kept whole


def planted_homes(experts: int, ranks: int, seed: int = 0) -> np.ndarray:
    """Returns ``[L, E]``: the group of each expert, mixed differently at every layer."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(experts) // (experts // ranks), (LAYERS, 1)), axis=1)


def planted_request(
    home_LE: np.ndarray, n: int, rng: np.random.Generator, loyal: float = 0.9
) -> RoutedRequest:
    """Returns the routing of a request.

    A token's id modulo the groups says which group's experts it chooses, with few exceptions.
    """
    experts, ranks = home_LE.shape[1], home_LE.max() + 1
    tokens_N = rng.integers(0, VOCAB - 2, n).astype(np.int32)  # the last two ids are never seen
    ids_LNK = np.empty((LAYERS, n, K), np.int32)
    for layer, home_E in enumerate(home_LE):
        for i, token in enumerate(tokens_N):
            mine = np.flatnonzero(home_E == token % ranks)
            pool = mine if len(mine) >= K and rng.random() < loyal else np.arange(experts)
            ids_LNK[layer, i] = rng.choice(pool, K, replace=False)
    weights_LNK = rng.dirichlet(np.ones(K), (LAYERS, n)).astype(np.float32)
    gates_LE = rng.dirichlet(np.ones(experts), LAYERS)
    embedding_D = rng.standard_normal(D)
    picks_M = np.arange(MAPS) * 7
    maps_MLE = np.full((MAPS, LAYERS, experts), 0.5 / experts)
    chosen_MLK = ids_LNK[:, picks_M].swapaxes(0, 1)
    np.put_along_axis(maps_MLE, chosen_MLK.astype(int), 0.5 / experts + 0.5 / K, 2)
    return RoutedRequest(tokens_N, ids_LNK, weights_LNK, gates_LE, embedding_D, maps_MLE, tokens_N[picks_M])


def planted_requests(home_LE: np.ndarray, requests: int = 12, seed: int = 1) -> list[RoutedRequest]:
    rng = np.random.default_rng(seed)
    return [planted_request(home_LE, int(rng.integers(20, 60)), rng) for _ in range(requests)]


def builder_for(home_LE: np.ndarray, **sizes: int) -> ProfileBuilder:
    return ProfileBuilder(layers=LAYERS, experts=home_LE.shape[1], k=K, vocab=VOCAB, **sizes)


def embeddings() -> np.ndarray:
    """Returns embeddings in which ids 38 and 39 are like 3 and 0."""
    table = np.random.default_rng(5).standard_normal((VOCAB, D)).astype(np.float32)
    table[38], table[39] = 2 * table[3], 0.5 * table[0]
    return table


def planted(
    experts: int = 8, ranks: int = 4, requests: int = 12, seed: int = 0
) -> tuple[Profile, np.ndarray]:
    """Returns a profile, and the groups from which it was made."""
    home_LE = planted_homes(experts, ranks, seed)
    builder = builder_for(home_LE)
    for request in planted_requests(home_LE, requests, seed + 1):
        builder.add(request)
    return builder.finish("planted", nearest_seen(embeddings(), builder.seen_V)), home_LE
