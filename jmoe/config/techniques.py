"""Frozen configuration of the techniques: tables ``[moe.binning]``, ``[moe.capacity]``,
``[moe.shuffle]``, ``[moe.offload]``.

A technique whose table is absent is off. A key that the chosen method does not read is refused, not ignored.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from jmoe_kernels.backends import Executor
from jmoe_kernels.settings import BinningMethod
from msgspec import Meta

from jmoe.config.reading import AtLeastOne, Positive, Size, check_fields, shown

# 0 is off
Bonus = Annotated[
    float, Meta(ge=0, le=2.0**127, description="a finite number above 0", extra={"float32": True})
]
Phase = Literal["prefill", "decode"]  # of a step; only a step whose tokens were all sampled decodes
PredictorName = Literal["expert_map", "next_gate", "token_table", "counts", "none"]
Eviction = Literal["expected_use", "expert_map", "lru", "lfu"]


@dataclass(frozen=True)
class LossyConfig(ABC):
    """The table of a lossy technique.

    name: key of the table in ``[moe]``.
    knobs: fields that may change between steps.
    """

    name: ClassVar[str]
    knobs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def check_layer(self, experts: int, k: int, ranks: int) -> None:
        """Raises ValueError if the table does not fit ``experts`` experts, ``k`` per token, on ``ranks``
        devices."""

    @property
    def reads_residency(self) -> bool:
        """Whether the stage reads which experts are on the device, so that it needs ``[moe.offload]``."""
        return False


@dataclass(frozen=True)
class BinningConfig(LossyConfig):
    """``[moe.binning]``: a decode batch's assignments go to fewer experts (see ``jmoe.moe.binning``).

    method: how the active experts are chosen.
    bin_width: width of an affinity bin in nats; smaller removes more experts.
    k0: number of each token's first choices that stay active, for "oea".
    keep: share of the batch's union that stays active, for "budget", "popularity" and "random".
    local_bonus: preference in nats for the experts of a token's own device, added before the method.
    resident_bonus: the same for experts that are on the device when experts are offloaded.
    """

    name: ClassVar[str] = "binning"
    method: BinningMethod = "affinity"
    bin_width: Positive = 0.5
    k0: AtLeastOne = 3
    keep: Positive = 0.5
    local_bonus: Bonus = 0.0
    resident_bonus: Bonus = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "moe.binning.")
        if self.keep > 1:
            raise ValueError(f"moe.binning.keep must be at most 1, all of the union, got {self.keep!r}")
        _check_read("moe.binning", self, "method", _BINNING_READS)

    @property
    def reads_residency(self) -> bool:
        return self.resident_bonus > 0

    def check_layer(self, experts: int, k: int, ranks: int) -> None:
        self._check_model(experts, k)
        self._check_ranks(ranks)

    def _check_ranks(self, ranks: int) -> None:
        """Raises ValueError for a preference that has no meaning with experts on ``ranks`` devices."""
        if self.local_bonus and ranks == 1:
            raise ValueError(
                "moe.binning.local_bonus needs experts on several devices: an expert parallel size of 2 or "
                "more, got 1"
            )

    def _check_model(self, experts: int, k: int) -> None:
        """Raises ValueError if, with ``experts`` experts and ``k`` per token, the method has no effect or
        keeps too few experts."""
        if experts <= k:
            raise ValueError(
                f"moe.binning needs more experts than a token uses: this model has {experts} and uses {k}"
            )
        if self.method == "oea" and self.k0 > k:
            raise ValueError(
                f"moe.binning.k0 must be from 1 to the model's {k} experts a token, got {self.k0}"
            )
        if k == 1 and self.method in ("affinity", "oea") and not (self.local_bonus or self.resident_bonus):
            raise ValueError(
                f"moe.binning.method = {self.method!r} has no effect on a model with 1 expert a token: every "
                f"token keeps its best; it needs one of {', '.join(_BUDGETS)}, or a bonus"
            )
        if self.method in _BUDGETS and self.keep * experts < k:
            raise ValueError(
                f"moe.binning.keep = {self.keep!r} is a budget of at most {self.keep * experts:g} of "
                f"{experts} experts, below the {k} of a token; it must be at least {k / experts:g}"
            )


@dataclass(frozen=True)
class CapacityConfig(LossyConfig):
    """``[moe.capacity]``: how many assignments an expert may take in one step (see ``jmoe.moe.capacity``).

    factor: gamma, the limit as a multiple of the even share.
    policy: what happens to the assignments over the limit.
    metric: which assignments stay.
    scope: whether the limit is per expert or per device.
    phase: steps in which the limit applies.
    rounds: number of attempts of "reroute".
    renormalize: whether the remaining assignments take over the weight of the dropped ones.
    """

    name: ClassVar[str] = "capacity"
    knobs: ClassVar[tuple[str, ...]] = ("factor",)
    factor: Positive = 1.5
    policy: Literal["drop", "reroute", "expand", "expert_drop"] = "drop"
    metric: Literal["score", "order", "reverse_order", "random"] = "score"
    scope: Literal["expert", "device"] = "expert"
    phase: Literal["prefill", "decode", "both"] = "prefill"
    rounds: Annotated[int, Meta(ge=1, le=16)] = 3
    renormalize: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "moe.capacity.")
        _check_read("moe.capacity", self, "policy", _CAPACITY_READS)

    def check_layer(self, experts: int, k: int, ranks: int) -> None:
        """Raises ValueError for a limit that has no meaning with experts on ``ranks`` devices."""
        for name, value in (("policy", self.policy), ("scope", self.scope)):
            if value in ("expand", "device") and ranks == 1:
                raise ValueError(
                    f"moe.capacity.{name} = {value!r} needs experts on several devices: an expert parallel "
                    f"size of 2 or more, got {ranks}"
                )


@dataclass(frozen=True)
class ShuffleConfig:
    """``[moe.shuffle]``: Speculative MoE, lossless (see ``jmoe.placement.group``).

    placement: file that ``jmoe place`` wrote, required; experts are renumbered by it.
    tokens: whether the reduce-scatter and the all-gather are shuffled.
    requests: whether a request goes to the rank that owns most of its experts.
    history: whether tokens are also placed by the ranks of their last two layers, as in the paper; token ids
        alone did better on the bundled model.
    """

    placement: str = ""
    tokens: bool = True
    requests: bool = False
    history: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "moe.shuffle.")
        if not self.placement:
            raise ValueError(f"moe.shuffle.placement must name a file, got {self.placement!r}")
        if self.history and not self.tokens:
            raise ValueError("moe.shuffle.history = true has no effect without moe.shuffle.tokens")

    def check_attention(self, attention: str) -> None:
        """Raises ValueError for a part that does not work with this split of attention."""
        for name, on, needed in (("tokens", self.tokens, "tp"), ("requests", self.requests, "dp")):
            if on and attention != needed:
                raise ValueError(f"moe.shuffle.{name} = true needs attention {needed!r}, got {attention!r}")


@dataclass(frozen=True)
class OffloadConfig:
    """``[moe.offload]``: fMoE, lossless: experts are in host memory, some of them also on the device.

    memory: bytes of device memory for routed experts ("2GiB" in a file), one pool for all layers.
    slots_per_layer: instead of ``memory``, the pool's number of experts divided by the number of layers.
    predictor: how the experts that the next layers need are predicted.
    eviction: which expert is evicted (``jmoe.offload.policy``).
    prefetch_distance: number of layers to look ahead.
    prefetch_per_layer: number of prefetch copies that one layer may start, the byte budget.
    store: profile for a warm start.
    store_size: iterations that the predictor "expert_map" keeps.
    executor: "graph" decides and copies inside the jitted step, "host" between the jitted parts of each
        layer; None chooses one, and ``jmoe doctor`` reports which and why.

    On a mesh, memory, slots_per_layer and prefetch_per_layer apply to each device, for the experts and parts
    of experts that it holds.
    """

    memory: Size | None = None
    slots_per_layer: AtLeastOne | None = None
    predictor: PredictorName = "next_gate"
    eviction: Eviction = "expected_use"
    prefetch_distance: AtLeastOne = 3
    prefetch_per_layer: AtLeastOne = 1
    store: str | None = None
    store_size: AtLeastOne = 1000
    executor: Executor | None = None

    def __post_init__(self) -> None:
        check_fields(self, "moe.offload.")
        if (self.memory is None) == (self.slots_per_layer is None):
            raise ValueError("moe.offload needs one of memory and slots_per_layer")
        if self.store == "":
            raise ValueError("moe.offload.store must name a file, got ''")
        if self.predictor == "token_table" and self.store is None:
            raise ValueError("moe.offload.predictor = 'token_table' needs moe.offload.store, a profile")
        _check_read("moe.offload", self, "predictor", _OFFLOAD_READS)

    def check_mesh(self, mesh: Mapping[str, int]) -> None:
        """Raises ValueError for an executor that does not run on several devices."""
        if self.executor == "host" and math.prod(mesh.values()) > 1:
            sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
            raise ValueError(
                "moe.offload.executor = 'host' drives one device, 'graph' any number: got a mesh of " + sizes
            )

    def check_model(self, layers: int, experts: int) -> None:
        """Raises ValueError for a look-ahead above ``layers`` or a prefetch above ``experts``."""
        limits = {
            "prefetch_distance": (layers, "layers that have experts"),
            "prefetch_per_layer": (experts, "experts of a layer on a device"),
        }
        for name, (limit, what) in limits.items():
            value = getattr(self, name)
            if value > limit and value != getattr(type(self), name):
                raise ValueError(f"moe.offload.{name} must be at most the {limit} {what}, got {shown(value)}")

    @property
    def num_extra_experts(self) -> int:
        """The number of experts that the memory holds in addition to the pool: the copies in progress (two
        that stream through, or one per prefetch if that is more) and one slot for copies that nothing
        requested."""
        return max(2, self.prefetch_per_layer) + 1

    def slots(self, *, layers: int, experts: int, k: int, expert_bytes: int) -> int:
        """Returns the number of slots of a device's pool; raises ValueError if one token's experts do not fit
        or if there are more slots per layer than experts.

        experts: number of experts of a layer on this device.
        k: number of them that one token may use.
        """
        self.check_model(layers, experts)
        extra = self.num_extra_experts
        if self.slots_per_layer is not None:
            if self.slots_per_layer > experts:
                raise ValueError(
                    f"moe.offload.slots_per_layer must be at most the {experts} experts of a layer on a "
                    f"device, got {self.slots_per_layer}"
                )
            slots, name = self.slots_per_layer * layers, f"slots_per_layer {self.slots_per_layer}"
        else:
            assert self.memory is not None
            slots, name = self.memory // expert_bytes - extra, f"memory {self.memory}"
        if slots < k:
            raise ValueError(
                f"moe.offload.{name} has room for {max(slots, 0)} experts and a token uses {k}: the minimum "
                f"is memory {(k + extra) * expert_bytes} ({k} experts and {extra} on their way, "
                f"{expert_bytes} bytes each)"
            )
        return min(slots, layers * experts)


_BUDGETS = ("budget", "popularity", "random")
_BINNING_READS = {"bin_width": ("affinity", "budget"), "k0": ("oea",), "keep": _BUDGETS}
_RANKED = ("drop", "reroute", "expand")
_CAPACITY_READS = {"factor": _RANKED, "metric": _RANKED, "scope": _RANKED, "rounds": ("reroute",)}
_FORECASTING = tuple(name for name in get_args(PredictorName) if name != "none")
_OFFLOAD_READS = {
    "prefetch_distance": _FORECASTING,
    "prefetch_per_layer": _FORECASTING,
    "store_size": ("expert_map",),
}


def _check_read(table: str, config: Any, key: str, readers: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ValueError for a key that is set but not read by the chosen method or policy (field ``key``)."""
    chosen = getattr(config, key)
    for name, methods in readers.items():
        value, default = getattr(config, name), getattr(type(config), name)
        if value != default and chosen not in methods:
            raise ValueError(
                f"{table}.{name} = {value!r} has no effect with {key} {chosen!r}; "
                f"it needs one of {', '.join(methods)}"
            )
