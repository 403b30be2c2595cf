"""Frozen configuration of the techniques: tables ``[moe.binning]``, ``[moe.capacity]``,
``[moe.shuffle]``, ``[moe.offload]``.

What is absent is off. A key that the chosen method does not read is refused, not ignored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from jmoe_kernels.backends import Executor
from jmoe_kernels.binning import Method
from msgspec import Meta

from jmoe.config.reading import AtLeastOne, Positive, Size, check_fields, shown

# 0 is off
Bonus = Annotated[
    float, Meta(ge=0, le=2.0**127, description="a finite number above 0", extra={"float32": True})
]
PredictorName = Literal["expert_map", "next_gate", "token_table", "counts", "none"]
Eviction = Literal["expected_use", "expert_map", "lru", "lfu"]


@dataclass(frozen=True)
class BinningConfig:
    """``[moe.binning]``: a decode batch's assignments on fewer experts (see ``jmoe.moe.binning``).

    method: how the experts that stay are chosen. bin_width: of an affinity bin, nats; smaller is stronger.
    k0: choices of every token that stay, for "oea". keep: share of the batch's union that stays, for
    "budget", "popularity" and "random". local_bonus: nats by which a token prefers the experts of its own
    device, before all of that; resident_bonus: the same for experts that are on the device at all, where
    experts are offloaded.
    """

    name: ClassVar[str] = "binning"
    method: Method = "affinity"
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

    def check_layer(self, experts: int, k: int, ranks: int) -> None:
        """Raises ValueError where ``experts``, ``k`` of them a token, on ``ranks`` devices do not fit."""
        self._check_model(experts, k)
        self._check_ranks(ranks)

    def _check_ranks(self, ranks: int) -> None:
        """Raises ValueError for a preference that means nothing with experts on ``ranks`` devices."""
        if self.local_bonus and ranks == 1:
            raise ValueError(
                "moe.binning.local_bonus needs experts on several devices: an expert parallel size of 2 or "
                "more, got 1"
            )

    def _check_model(self, experts: int, k: int) -> None:
        """Raises ValueError where ``experts``, ``k`` of them a token, leave nothing or too few to keep."""
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
class CapacityConfig:
    """``[moe.capacity]``: how many assignments an expert may take in one step (see ``jmoe.moe.capacity``).

    factor: the limit as a multiple of the even share, gamma. policy: what becomes of the assignments over
    it. metric: which of them stay. scope: whether an expert or a device has the limit. phase: the steps
    it holds in. rounds: attempts of "reroute". renormalize: survivors take over the weight of the dropped.
    """

    name: ClassVar[str] = "capacity"
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
        """Raises ValueError for a limit that means nothing with experts on ``ranks`` devices."""
        for name, value in (("policy", self.policy), ("scope", self.scope)):
            if value in ("expand", "device") and ranks == 1:
                raise ValueError(
                    f"moe.capacity.{name} = {value!r} needs experts on several devices: an expert parallel "
                    f"size of 2 or more, got {ranks}"
                )


# their names are their keys in ``[moe]``
LossyConfig = BinningConfig | CapacityConfig


@dataclass(frozen=True)
class ShuffleConfig:
    """``[moe.shuffle]``: Speculative MoE, lossless (see ``jmoe.placement.group``).

    placement: the file that ``jmoe place`` wrote, required; experts are renumbered by it. tokens: shuffled
    reduce-scatter and all-gather. requests: a request goes to the rank that owns most of its experts.
    history: tokens also by the ranks of their last two layers, as in the paper; token ids alone did better
    on the bundled model.
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
        """Raises ValueError for a part that the way tokens come to the layers leaves no room for."""
        for name, on, needed in (("tokens", self.tokens, "tp"), ("requests", self.requests, "dp")):
            if on and attention != needed:
                raise ValueError(f"moe.shuffle.{name} = true needs attention {needed!r}, got {attention!r}")


@dataclass(frozen=True)
class OffloadConfig:
    """``[moe.offload]``: fMoE, lossless: experts lie in host memory, some of them on the device too.

    memory: bytes of the device for routed experts ("2GiB" in a file), one pool for all layers; or
    slots_per_layer: room for so many experts times the layers. predictor: what says which experts the next
    layers need; eviction: which expert gives way (``jmoe.offload.policy``). prefetch_distance: layers ahead.
    prefetch_per_layer: copies ahead of need that one layer may begin, the byte budget. store: the profile to
    start warm from; store_size: iterations that predictor "expert_map" keeps. executor: "graph" decides and
    copies inside the jitted step, "host" between the jitted parts of each layer; None picks and ``jmoe
    doctor`` says which and why.

    On a mesh memory, slots_per_layer and prefetch_per_layer are those of each device, for the experts and
    the parts of experts that it holds.
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
        """Raises ValueError for looking further ahead than ``layers`` or fetching more than ``experts``."""
        limits = {
            "prefetch_distance": (layers, "layers that have experts"),
            "prefetch_per_layer": (experts, "experts of a layer on a device"),
        }
        for name, (limit, what) in limits.items():
            value = getattr(self, name)
            if value > limit and value != getattr(type(self), name):
                raise ValueError(f"moe.offload.{name} must be at most the {limit} {what}, got {shown(value)}")

    @property
    def aside(self) -> int:
        """Experts that the memory holds beside the pool's: what is on its way, two that stream through or one
        for each prefetch, and a slot that copies without a wish go to."""
        return max(2, self.prefetch_per_layer) + 1

    def slots(self, *, layers: int, experts: int, k: int, expert_bytes: int) -> int:
        """Slots of a device's pool; ValueError where not even one token's experts fit or there are fewer.

        experts: of a layer on this device; k: those of them that one token may use.
        """
        self.check_model(layers, experts)
        aside = self.aside
        if self.slots_per_layer is not None:
            if self.slots_per_layer > experts:
                raise ValueError(
                    f"moe.offload.slots_per_layer must be at most the {experts} experts of a layer on a "
                    f"device, got {self.slots_per_layer}"
                )
            slots, name = self.slots_per_layer * layers, f"slots_per_layer {self.slots_per_layer}"
        else:
            assert self.memory is not None
            slots, name = self.memory // expert_bytes - aside, f"memory {self.memory}"
        if slots < k:
            raise ValueError(
                f"moe.offload.{name} has room for {max(slots, 0)} experts and a token uses {k}: the minimum "
                f"is memory {(k + aside) * expert_bytes} ({k} experts and {aside} on their way, "
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


def _check_read(table: str, config: Any, by: str, readers: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ValueError for a key that is set and not read by the method or policy, the field ``by``."""
    chosen = getattr(config, by)
    for name, methods in readers.items():
        value, default = getattr(config, name), getattr(type(config), name)
        if value != default and chosen not in methods:
            raise ValueError(
                f"{table}.{name} = {value!r} has no effect with {by} {chosen!r}; "
                f"it needs one of {', '.join(methods)}"
            )
