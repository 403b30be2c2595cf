"""Frozen configuration of how MoE layers run: the table ``[moe]`` and the tables of its techniques.

An unknown key raises an error that names the nearest known key.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from jmoe_kernels.backends import ExpertKernel

from jmoe.config.choices import AttentionSplit
from jmoe.config.reading import Positive, check_fields, from_table, named, read_toml, unique_json
from jmoe.config.techniques import BinningConfig, CapacityConfig, LossyConfig, OffloadConfig, ShuffleConfig

TransportName = Literal["replicated", "all_to_all", "ragged_all_to_all"]
TRAINING = {"mode": "training"}  # marks a field that no engine accepts


@dataclass(frozen=True)
class MoEConfig:
    """The settings by which the MoE layers run. The default is lossless: the result equals plain top-k bit
    for bit.

    attention: split of attention: each rank has its own sequences ("dp"), or the experts' ranks share heads
        ("tp", see ``jmoe.mesh.Split``). It is a separate flag, not a key of the config file.
    transport: how tokens reach their experts' ranks (see ``jmoe.moe.transport``).
    kernel: grouped-expert implementation; None chooses one, which ``jmoe doctor`` reports.
    binning: table by which decode batches use fewer experts, lossy; None is off.
    capacity: limit on an expert's load, lossy; None is off. It applies to the result of binning.
    shuffle: table by which experts are renumbered by a placement, and tokens or requests go where their
        experts are; lossless; None is off.
    offload: table by which experts are in host memory, some also on the device; lossless; None is off.
    train_capacity_factor: for training only, with kernel "batched": rows of an expert's buffer as a multiple
        of its even share.
    """

    attention: AttentionSplit = "dp"
    transport: TransportName = "replicated"
    kernel: ExpertKernel | None = None
    train_capacity_factor: Positive | None = field(default=None, metadata=TRAINING)
    binning: BinningConfig | None = None
    capacity: CapacityConfig | None = None
    shuffle: ShuffleConfig | None = None
    offload: OffloadConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self, "moe.")
        if self.train_capacity_factor is not None and self.kernel != "batched":
            raise ValueError("moe.train_capacity_factor needs moe.kernel = 'batched'")
        if self.binning is not None and self.binning.resident_bonus and self.offload is None:
            raise ValueError("moe.binning.resident_bonus needs moe.offload: all experts are on the device")
        if self.offload is not None and self.train_capacity_factor is not None:
            raise ValueError("moe.offload and moe.train_capacity_factor exclude each other")

    @property
    def stages(self) -> tuple[LossyConfig, ...]:
        """The lossy techniques that are on, in the order in which they act; if empty, nothing is lossy."""
        return tuple(table for table in (self.binning, self.capacity) if table is not None)

    @property
    def knobs(self) -> dict[str, float]:
        """The settings of the lossy techniques that may change between steps, by names like
        "capacity.factor"."""
        return {
            f"{table.name}.{field}": getattr(table, field) for table in self.stages for field in table.knobs
        }

    def without_offload(self) -> Self:
        """Returns the same settings with all experts on the devices, without the stages that need offload."""
        needing: dict[str, Any] = {table.name: None for table in self.stages if table.reads_residency}
        return dataclasses.replace(self, offload=None, **needing)

    def check_serves(self) -> None:
        """Raises ValueError for a setting that has a meaning only in training."""
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.metadata.get("mode") == TRAINING["mode"] and value != each.default:
                raise ValueError(
                    f"moe.{each.name} = {value!r} is for training only, no engine takes it; a limit on what "
                    "experts compute is moe.capacity"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Makes the config from the JSON form or the TOML form, which has one more level, ``moe``."""
        if isinstance(values, Mapping) and set(values) == {"moe"}:
            values = values["moe"]
        return from_table(cls, values, "moe config", "moe.", excluded=("attention",))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Makes the config from a JSON object or the name of a ``.toml`` file."""
        if text.lstrip().startswith("{"):
            try:
                values = unique_json(text)
            except ValueError as error:
                raise ValueError(f"moe config is not valid JSON: {error}") from None
            return cls.from_dict(values)
        values = read_toml(Path(text))
        with named(text):
            return cls.from_dict(values)
