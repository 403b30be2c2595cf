"""The settings of an engine, which the command line, ``--config`` files and ``LLM`` set."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from jmoe_kernels.settings import Activations
from msgspec import Meta

from jmoe.checkpoint import read_config
from jmoe.checkpoint.quantised.codings import Quantize
from jmoe.checkpoint.source import ModelFiles, model_path
from jmoe.config.choices import (
    AttentionSplit,
    DTypeChoice,
    KVCacheName,
    QuantizationName,
    QuantizedProducts,
)
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.reading import AtLeastOne, Size, check_fields
from jmoe.engine.schedule.admission import REASONS, Reason

BUNDLED = {"tiny": Path(__file__).parents[2] / "assets" / "tiny"}
MAX_SEQS = 1 << 16  # host arrays and compiled shapes have a row for each
MAX_STEP = 1 << 20  # tokens


@dataclass(frozen=True)
class EngineSettings:
    """The settings with which a model runs. None means the model's own value, or as much as the other
    settings need and the machine has (see ``jmoe.engine.deployment.deployment``).

    max_model_len: tokens of a context.
    dtype: dtype of the weights and the KV cache; "auto" is the checkpoint's own.
    data_parallel_size: groups of ranks that each have a whole copy of the weights and their own requests.
    expert_parallel_size: ranks over which the experts are split.
    tensor_parallel_size: ranks over which attention heads and the inner dimension of experts are split.
    attention: "dp" if each rank of the expert axis has its own sequences, "tp" if these ranks share the heads
        of one sequence (see ``jmoe.mesh.Split``).
    moe: settings of the MoE layers.
    max_num_seqs: sequences that run at once, on all ranks together.
    max_num_batched_tokens: tokens of a step on each rank: one of every request that is decoded; the rest, at
        least one page, is for prompts. A longer prompt takes several steps.
    max_queue: requests that may wait; further ones are refused.
    kv_memory: bytes of the KV cache on each rank, also as text such as "2GiB".
    enable_prefix_caching: whether prompts with equal beginnings share pages.
    quantization: how weights are quantised while they load; None keeps them as the checkpoint has them.
    quantize: weights that are quantised, those of routed experts or of all products.
    kv_cache_dtype: how keys and values are cached: "auto" in the model's dtype, "int8" or "fp8" in one byte a
        number.
    activation_dtype: what activations are rounded to where a kernel multiplies with the codes of quantised
        weights; "auto" is the kernel's own choice: on a CPU int16, or the model's dtype for weights of
        eight-bit floats.
    dispatch: reasons that choose the rank of a request, the first one first (see
        ``jmoe.engine.schedule.admission``).
    """

    max_model_len: AtLeastOne | None = None
    dtype: DTypeChoice = "auto"
    quantization: QuantizationName | None = None
    quantize: QuantizedProducts = "all"
    kv_cache_dtype: KVCacheName = "auto"
    activation_dtype: Activations = "auto"
    data_parallel_size: AtLeastOne = 1
    expert_parallel_size: AtLeastOne = 1
    tensor_parallel_size: AtLeastOne = 1
    attention: AttentionSplit = "dp"
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
        """Raises ValueError if a reason is named twice, or if a named one has no effect."""
        if len(set(self.dispatch)) < len(self.dispatch):
            raise ValueError(f"dispatch names some of {', '.join(REASONS)}, each once; got {self.dispatch}")
        if set(self.dispatch) == set(REASONS):
            return
        if "prefix" in self.dispatch and not self.enable_prefix_caching:
            raise ValueError("dispatch 'prefix' has no effect without enable_prefix_caching")
        if "experts" in self.dispatch and not (self.moe.shuffle and self.moe.shuffle.requests):
            raise ValueError("dispatch 'experts' has no effect without moe.shuffle.requests = true")

    @property
    def quantization_request(self) -> Quantize | None:
        return None if self.quantization is None else Quantize(self.quantization, self.quantize)

    def without_effect(self, data: int, expert: int, tensor: int) -> list[str]:
        """Returns the settings that have no effect on a mesh of these sizes but would on others, a line
        each."""
        lines = []
        if self.quantization is None and self.quantize != "all":
            lines.append(f"quantize = {self.quantize!r} has no effect without quantization")
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


def read_model(model: ModelFiles, settings: EngineSettings) -> ModelConfig:
    """Returns the model's shape, with the dtypes of the settings; raises ValueError as ``read_config``
    does."""
    cfg = read_config(model, settings.dtype)
    return dataclasses.replace(cfg, kv_cache_dtype=settings.kv_cache_dtype)


def model_directory(model: str | Path) -> Path:
    """Returns the directory of a bundled model's name or of a path, or the GGUF file that it is or holds (see
    ``model_path``); raises ValueError if ``model`` is neither a name nor a path."""
    if not isinstance(model, str | Path):
        raise ValueError(f"a model is a name or a directory, got {model!r}")
    return BUNDLED.get(str(model)) or model_path(Path(model))
