"""The exact assignment of N rows to N places, by the Hungarian method."""

import numpy as np
from jaxtyping import Float, Int


def assign(gain_NN: Float[np.ndarray, "N N"]) -> Int[np.ndarray, " N"]:
    """The place of each row, every place used once, that maximises the sum of ``gain_NN[row, place]``.

    It uses shortest augmenting paths with potentials, O(N^3).
    """
    cost_NN = -np.asarray(gain_NN, np.float64)
    n = len(cost_NN)
    row_of = np.full(n + 1, -1)  # the last place is where each search starts
    row_price, place_price = np.zeros(n), np.zeros(n + 1)
    for row in range(n):
        row_of[n], at = row, n
        distance, before = np.full(n, np.inf), np.full(n, n)
        visited = np.zeros(n + 1, bool)
        while row_of[at] >= 0:
            visited[at] = True
            reached = cost_NN[row_of[at]] - row_price[row_of[at]] - place_price[:n]
            nearer = ~visited[:n] & (reached < distance)
            distance[nearer], before[nearer] = reached[nearer], at
            following = int(np.argmin(np.where(visited[:n], np.inf, distance)))
            step = distance[following]
            row_price[row_of[visited]] += step
            place_price[visited] -= step
            distance[~visited[:n]] -= step
            at = following
        while at != n:
            row_of[at] = row_of[before[at]]
            at = before[at]
    place = np.empty(n, np.int64)
    place[row_of[:n]] = np.arange(n)
    return place
