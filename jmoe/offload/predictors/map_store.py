"""``MapStore``: the gate distributions of past iterations, in arrays of a fixed size.

fMoE section 2.2: an entry is the input embedding of an iteration and its expert map, the gate distributions
of all layers. If the store is full, a new entry replaces the entry that it makes most redundant.
"""

from dataclasses import dataclass
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float

EXACT = lax.Precision.HIGHEST  # keeps cosines near 1 distinct; accelerators would round their factors


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MapStore:
    """C entries; all numbers are float32.

    keys_CD: input embeddings, of length 1.
    maps_CLE: gate distributions.
    squares_CL: squared length of each layer's distribution, so that a search reads only one layer of a map.
    used_C: whether the entry is filled.
    """

    keys_CD: Float[Array, "C D"]
    maps_CLE: Float[Array, "C L E"]
    squares_CL: Float[Array, "C L"]
    used_C: Bool[Array, " C"]

    @classmethod
    def empty(cls, size: int, layers: int, experts: int, width: int) -> Self:
        return cls(
            jnp.zeros((size, width), jnp.float32),
            jnp.zeros((size, layers, experts), jnp.float32),
            jnp.zeros((size, layers), jnp.float32),
            jnp.zeros(size, bool),
        )

    @classmethod
    def build(
        cls,
        embeddings_ID: Float[Array | np.ndarray, "I D"],
        maps_ILE: Float[Array | np.ndarray, "I L E"],
        size: int,
        distance: int,
    ) -> Self:
        """Makes a store of I iterations, inserted one after another, so that the rule decides every
        replacement."""
        layers, experts = maps_ILE.shape[1:]
        store = cls.empty(size, layers, experts, embeddings_ID.shape[1])
        arrays = (jnp.asarray(embeddings_ID, jnp.float32), jnp.asarray(maps_ILE, jnp.float32))
        return _insert_all(store, *arrays, distance)


def unit(x_ZD: Float[Array, "*Z D"]) -> Float[Array, "*Z D"]:
    """Returns the vectors scaled to length 1; zeros stay zeros."""
    return x_ZD / jnp.maximum(jnp.linalg.norm(x_ZD, axis=-1, keepdims=True), 1e-30)


def cosine(dots_Z: Array, squares_Z: Array, other_squares_Z: Array) -> Array:
    """Returns the cosine from the dot product and the squared lengths; it is 0 if either length is 0."""
    return dots_Z / jnp.sqrt(jnp.maximum(squares_Z * other_squares_Z, 1e-30))


def redundancy(semantic_C: Array, trajectory_C: Array, distance: int, layers: int) -> Float[Array, " C"]:
    """Returns RDY = (d/L) cos of the embeddings + ((L-d)/L) cos of the whole maps: layers below the distance
    are forecast by embedding, those above it by trajectory."""
    share = min(distance, layers) / layers
    return share * semantic_C + (1 - share) * trajectory_C


def put(
    store: MapStore,
    key_D: Float[Array, " D"],
    map_LE: Float[Array, "L E"],
    redundancy_C: Float[Array, " C"],
    keep: Bool[Array, ""] | bool = True,
) -> MapStore:
    """Returns the store with one more iteration, in the first free place or in that of the most redundant
    entry.

    key_D: input embedding, of length 1.
    map_LE: gate distributions of the iteration.
    redundancy_C: how redundant the new iteration makes each entry.
    keep: whether to add it; if not, the store stays as it is. The store also stays if the embedding or the
        map has a number that is not finite: one such entry would be the nearest of every later step.
    """
    keep = keep & jnp.all(jnp.isfinite(key_D)) & jnp.all(jnp.isfinite(map_LE))
    place = jnp.where(jnp.all(store.used_C), jnp.argmax(redundancy_C), jnp.argmin(store.used_C))
    place = jnp.where(keep, place, store.used_C.shape[0])  # past the end nothing is written
    new = MapStore(key_D, map_LE, jnp.sum(map_LE * map_LE, 1), jnp.ones((), bool))
    return jax.tree.map(lambda all_C, one: all_C.at[place].set(one, mode="drop"), store, new)


def insert(
    store: MapStore, embedding_D: Float[Array, " D"], map_LE: Float[Array, "L E"], distance: int
) -> MapStore:
    """Returns the store with an iteration of which only the embedding and the map are known, not the
    redundancy."""
    key_D = unit(embedding_D)
    semantic_C = jnp.matmul(store.keys_CD, key_D, precision=EXACT)
    dots_C = jnp.einsum("cle,le->c", store.maps_CLE, map_LE, precision=EXACT)
    trajectory_C = cosine(dots_C, jnp.sum(map_LE * map_LE), jnp.sum(store.squares_CL, 1))
    return put(store, key_D, map_LE, redundancy(semantic_C, trajectory_C, distance, map_LE.shape[0]))


@partial(jax.jit, static_argnums=3)
def _insert_all(store: MapStore, embeddings_ID: Array, maps_ILE: Array, distance: int) -> MapStore:
    def one(store: MapStore, iteration: tuple[Array, Array]) -> tuple[MapStore, None]:
        return insert(store, *iteration, distance), None

    return lax.scan(one, store, (embeddings_ID, maps_ILE))[0]
