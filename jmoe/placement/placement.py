"""The places of each layer's experts: a table of slots, and the placement that evens out the ranks' load.

``Placement`` is what every offline method makes and the engine reads: expert loads or routing statistics ->
``Placement`` -> ``placement.npz``. This is host code in numpy; nothing here runs in a step.

``balance`` is the baseline that adds redundant experts, after the idea of DeepSeek's expert-parallel load
balancer (EPLB, github.com/deepseek-ai/EPLB): the hottest experts get replicas, and slots are assigned to
ranks, heaviest first, always to the lightest rank with room. If the expert groups of group-limited routing
split evenly over the nodes, the groups are assigned to nodes first, so that a token's groups stay within few
nodes. It is lossless: a replica computes the same as its expert. It does not decide which replica a token
uses.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float, Int

from jmoe.placement.npz import save_arrays, saved_arrays
from jmoe.placement.tables import Tables

FORMAT = "jmoe placement 2"


@dataclass(frozen=True, eq=False)
class Placement:
    """A table of the expert of each slot, ``[layers, slots]``; the slots are split over the ranks in order.

    experts_LP: expert id of each slot, int32. Every expert has at least one slot. With as many slots as
        experts per row is a permutation; with more, some experts have replicas.
    ranks: number of ranks.
    model: identity of the model that the placement was made for.
    tables: where its tokens go, if that was computed.

    Raises ValueError if the table is not a placement.
    """

    experts_LP: Int[np.ndarray, "L P"]
    ranks: int
    model: str
    tables: Tables | None = None

    def __post_init__(self) -> None:
        table = np.asarray(self.experts_LP)
        if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.integer) or table.min() < 0:
            raise ValueError(f"a placement is a table [layers, slots] of expert ids, got {table.shape}")
        _check_parts("slots", table.shape[1], "ranks", self.ranks)
        if table.max() >= table.shape[1]:
            raise ValueError(f"expert {table.max()} needs more than {table.shape[1]} slots: ids start at 0")
        object.__setattr__(self, "experts_LP", table.astype(np.int32))
        self.experts_LP.flags.writeable = False
        homeless = np.argwhere(self.replicas_LE == 0)
        if len(homeless):
            raise ValueError(f"layer {homeless[0, 0]} has no slot for expert {homeless[0, 1]}")
        if self.tables is not None:
            self.tables.check(layers=self.layers, ranks=self.ranks)

    @property
    def rank_LE(self) -> Int[np.ndarray, "L E"]:
        """The rank that computes each expert, if every expert has one slot."""
        layers, slots = self.experts_LP.shape
        ranks_LP = np.broadcast_to(np.arange(slots) * self.ranks // slots, (layers, slots))
        rank_LE = np.zeros((layers, int(self.experts_LP.max()) + 1), np.int64)
        np.put_along_axis(rank_LE, self.experts_LP.astype(np.int64), ranks_LP, axis=1)
        return rank_LE

    @property
    def layers(self) -> int:
        return self.experts_LP.shape[0]

    @property
    def experts(self) -> int:
        return int(self.experts_LP.max()) + 1

    @cached_property
    def replicas_LE(self) -> Int[np.ndarray, "L E"]:
        """The number of slots that hold each expert."""
        return np.stack([np.bincount(row, minlength=self.experts) for row in self.experts_LP])

    @cached_property
    def slots_LEM(self) -> Int[np.ndarray, "L E M"]:
        """The slots of each expert in ascending order, then -1; M is the largest number of replicas."""
        slots = np.full((self.layers, self.experts, self.replicas_LE.max()), -1, np.int32)
        for layer, row in enumerate(self.experts_LP):
            for expert in range(self.experts):
                mine = np.flatnonzero(row == expert)
                slots[layer, expert, : len(mine)] = mine
        return slots

    @property
    def home_LE(self) -> Int[np.ndarray, "L E"]:
        """The rank of each expert's first slot."""
        return self.slots_LEM[:, :, 0] // (self.experts_LP.shape[1] // self.ranks)

    @property
    def permutes(self) -> bool:
        """Whether the placement only renumbers the experts: each has one slot."""
        return self.experts_LP.shape[1] == self.experts

    def by_expert(self, counts_LP: Int[np.ndarray, "L P"]) -> Int[np.ndarray, "L E"]:
        """Returns the sum of the counts over each expert's slots."""
        counts_LE = np.zeros((self.layers, self.experts), counts_LP.dtype)
        np.add.at(counts_LE, (np.arange(self.layers)[:, None], self.experts_LP), counts_LP)
        return counts_LE

    def rank_loads(self, loads_LE: Float[np.ndarray, "L E"]) -> Float[np.ndarray, "L R"]:
        """Returns the load of each rank, if an expert's load is split evenly over its replicas."""
        share_LP = np.take_along_axis(loads_LE / self.replicas_LE, self.experts_LP, axis=1)
        return share_LP.reshape(self.layers, self.ranks, -1).sum(axis=2)

    def check(self, *, model: str, layers: int, experts: int, ranks: int) -> None:
        """Raises ValueError unless this placement was made for that model on that many ranks."""
        ours = (self.model, self.layers, self.experts, self.ranks)
        for what, mine, theirs in zip(
            ("model", "MoE layers", "experts", "ranks"), ours, (model, layers, experts, ranks), strict=True
        ):
            if mine != theirs:
                raise ValueError(f"the placement is for another model or mesh: {what} {mine}, here {theirs}")

    def save(self, path: Path) -> None:
        arrays = {"experts": self.experts_LP, "ranks": self.ranks, "model": self.model}
        tables = {} if self.tables is None else self.tables.arrays()
        save_arrays(path, FORMAT, arrays | tables)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Loads what ``save`` wrote; raises a ValueError that names the file if it is absent, malformed or of
        another kind."""
        with saved_arrays(path, "placement", FORMAT) as arrays:
            tables = Tables.from_arrays(arrays)
            return cls(arrays["experts"], int(arrays["ranks"]), str(arrays["model"]), tables)


def balance(
    loads_LE: Float[np.ndarray, "L E"],
    *,
    slots: int,
    ranks: int,
    nodes: int = 1,
    groups: int = 1,
    model: str,
) -> Placement:
    """Places E experts in ``slots`` slots so that the highest load of a rank is low.

    loads_LE: load of each expert.
    slots: number of slots on all ranks.
    ranks: number of ranks.
    nodes: number of machines, each with the same number of ranks.
    groups: number of groups of group-limited routing, contiguous and of equal size. A group stays on one node
        only if the nodes divide the groups; if not, all ranks are treated alike.
    model: identity of the model.

    Raises ValueError, with the limit, for sizes that do not fit.
    """
    loads_LE = np.asarray(loads_LE, np.float64)
    if loads_LE.ndim != 2 or not loads_LE.size or not np.isfinite(loads_LE).all() or loads_LE.min() < 0:
        raise ValueError(
            f"loads must be a table [layers, experts] of numbers from 0 up, got {loads_LE.shape}"
        )
    experts = loads_LE.shape[1]
    if slots < experts:
        raise ValueError(f"{experts} experts need at least {experts} slots, got {slots}")
    _check_parts("slots", slots, "ranks", ranks)
    _check_parts("ranks", ranks, "nodes", nodes)
    _check_parts("experts", experts, "groups", groups)
    if groups % nodes:
        nodes = groups = 1
    rows = [_balance_layer(load_E, slots, ranks, nodes, groups) for load_E in loads_LE]
    return Placement(np.stack(rows), ranks, model)


def _check_parts(name: str, size: int, part_name: str, num_parts: int) -> None:
    if num_parts < 1 or size % num_parts:
        raise ValueError(f"{size} {name} do not split evenly over {num_parts} {part_name}")


def _balance_layer(
    load_E: Float[np.ndarray, " E"], slots: int, ranks: int, nodes: int, groups: int
) -> Int[np.ndarray, " P"]:
    """Assigns groups to nodes; then, within each node, makes replicas of the hottest experts and assigns
    slots to ranks."""
    members = np.arange(len(load_E)).reshape(groups, -1)
    row = []
    for mine in _deal(load_E[members].sum(axis=1), nodes):
        experts = members[mine].ravel()
        copies = experts[_with_replicas(load_E[experts], slots // nodes)]
        share = load_E[copies] / np.bincount(copies, minlength=len(load_E))[copies]
        row.append(copies[_deal(share, ranks // nodes)].ravel())
    return np.concatenate(row)


def _deal(weights: np.ndarray, packs: int) -> Int[np.ndarray, "packs size"]:
    """Deals items to packs, equally many to each: they go, heaviest first, to the lightest pack with room.
    Returns the items of each pack."""
    size = len(weights) // packs
    contents: list[list[int]] = [[] for _ in range(packs)]
    total = np.zeros(packs)
    for item in np.argsort(-weights, kind="stable"):
        pack = int(np.argmin(total))
        contents[pack].append(int(item))
        total[pack] = total[pack] + weights[item] if len(contents[pack]) < size else np.inf
    return np.array(contents)


def _with_replicas(load: np.ndarray, slots: int) -> list[int]:
    """Returns every expert once, then one replica at a time of the expert with the highest load per
    replica."""
    copies, count = list(range(len(load))), [1] * len(load)
    while len(copies) < slots:
        hottest = max(range(len(load)), key=lambda e: (load[e] / count[e], -count[e], -e))
        copies.append(hottest)
        count[hottest] += 1
    return copies
