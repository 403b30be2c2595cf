"""How to run a model: what the command line, ``--config`` files and ``LLM`` set."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from jmoe.config.model import MoEConfig
from jmoe.config.reading import AtLeastOne, Size, check_fields
from jmoe.engine.schedule.admission import REASONS, Reason

BUNDLED = {"tiny": Path(__file__).parents[2] / "assets" / "tiny"}
MAX_SEQS = 1 << 16  # host arrays and compiled shapes have a row for each
MAX_STEP = 1 << 20  # tokens


@dataclass(frozen=True)
class EngineSettings:
    """How to run a model. Sizes: sequences (max_num_seqs), tokens (max_model_len, max_num_batched_tokens),
    bytes (kv_memory, on each rank, also as text such as "2GiB"). None means: the model's, or as much as the
    others need and the machine has (see ``jmoe.engine.deployment.deployment``).

    max_num_batched_tokens: what a step holds on each rank: a token of every request that is decoded, and of a
    prompt what is left, at least one page; a longer prompt takes several steps. enable_prefix_caching:
    prompts that begin alike share pages. dispatch: what says which rank a request goes to, the first one
    first (see ``jmoe.engine.schedule.admission``).
    """

    max_model_len: AtLeastOne | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    data_parallel_size: AtLeastOne = 1
    expert_parallel_size: AtLeastOne = 1
    tensor_parallel_size: AtLeastOne = 1
    attention: Literal["dp", "tp"] = "dp"
    moe: MoEConfig = field(default_factory=MoEConfig)
    max_num_seqs: Annotated[int, Meta(ge=1, le=MAX_SEQS)] = 16
    max_num_batched_tokens: Annotated[int, Meta(ge=1, le=MAX_STEP)] = 1024
    max_queue: AtLeastOne = 1024
    kv_memory: Size | None = None
    enable_prefix_caching: bool = True
    dispatch: tuple[Reason, ...] = REASONS

    def __post_init__(self) -> None:
        check_fields(self)
        if self.moe.attention not in ("dp", self.attention):
            raise ValueError(f"attention is {self.attention!r} here and {self.moe.attention!r} in moe")
        object.__setattr__(self, "moe", dataclasses.replace(self.moe, attention=self.attention))
        self.moe.check_serves()
        if self.moe.shuffle is not None:
            self.moe.shuffle.check_attention(self.attention)
        self._check_dispatch()

    def _check_dispatch(self) -> None:
        """Raises ValueError for reasons given twice, and for one that was named and has nothing to say."""
        if len(set(self.dispatch)) < len(self.dispatch):
            raise ValueError(f"dispatch names some of {', '.join(REASONS)}, each once; got {self.dispatch}")
        if set(self.dispatch) == set(REASONS):
            return
        if "prefix" in self.dispatch and not self.enable_prefix_caching:
            raise ValueError("dispatch 'prefix' has no effect without enable_prefix_caching")
        if "experts" in self.dispatch and not (self.moe.shuffle and self.moe.shuffle.requests):
            raise ValueError("dispatch 'experts' has no effect without moe.shuffle.requests = true")

    def without_effect(self, data: int, expert: int, tensor: int) -> list[str]:
        """What is set and does nothing on a mesh of these sizes, a line each; on others it has its effect."""
        lines = []
        if self.moe.transport != MoEConfig.transport and data * expert * tensor == 1:
            lines.append(
                f"moe.transport = {self.moe.transport!r} has no effect on one device: all experts are there"
            )
        if self.attention == "tp" and expert == 1:
            lines.append(
                "attention = 'tp' has no effect with an expert parallel size of 1: heads are not shared"
            )
        ranks = data * (expert if self.attention == "dp" else 1)
        if self.dispatch != REASONS and ranks == 1:
            lines.append("dispatch has no effect with one rank: every request goes to it")
        return lines


def model_directory(model: str | Path) -> Path:
    """The directory of a bundled model's name or of a path; ValueError for what is neither."""
    if not isinstance(model, str | Path):
        raise ValueError(f"a model is a name or a directory, got {model!r}")
    return BUNDLED.get(str(model), Path(model))
