"""Small models of every kind of layer, and what their compiled steps do with a far larger page pool."""

from dataclasses import dataclass, field
from typing import Any

from support.aot.pool_text import walks
from support.models.small import config

from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.parts import LatentConfig
from jmoe.config.techniques import OffloadConfig
from jmoe.engine.deployment.lowering import lower_copy, lower_step
from jmoe.engine.step.inputs import Sizes
from jmoe.mesh import Mesh, split_attention
from jmoe.nn.kinds import kind_of, page_bytes

DECODE, MIXED = 1, 64  # tokens of a step: one of each sequence; of prompts, in a step that also decodes
PAGE, SEQUENCES, TABLE = 32, 4, 8
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinks and windows": {"attention_sinks": True, "sliding_window": 40, "qk_norm": "none"},
    "chunks": {
        "layer_types": ("chunked_attention",), "attention_chunk_size": 48, "qk_norm": "none",
    },
    "latent": {
        "latent": LatentConfig(96, 32, 32, 32), "qk_norm": "none", "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "int8": {"kv_cache_dtype": "int8"},
    "fp8": {"kv_cache_dtype": "fp8"},
}  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """A kind of layer over a page pool.

    kind: name of the kind of layer.
    tokens: number of tokens of the step.
    pages: number of pages of a rank.
    moe: configuration of the MoE layers.
    wide: whether heads have a dimension that the kernels of accelerators take.
    copies: whether the program is the copy of a page instead of a step.
    """

    kind: str = "plain"
    tokens: int = MIXED
    pages: int = 1 << 20
    moe: dict[str, Any] = field(default_factory=dict)
    wide: bool = False
    copies: bool = False

    @property
    def cfg(self) -> ModelConfig:
        """Returns the model's configuration."""
        wide = {"head_dim": 128, "hidden_size": 256, "moe_intermediate_size": 128, "dtype": "bfloat16"}
        return config(**{"num_hidden_layers": 1} | (wide if self.wide else {}) | KINDS[self.kind])


@dataclass(frozen=True)
class Found:
    """The operations of a compiled step, and bytes of one device.

    walks: what goes over a pool.
    layer: bytes of one layer's pages.
    pages: bytes of all pages.
    temporary: bytes that the compiler needs in addition.
    aliased: bytes that results share with arguments.
    moved: bytes that the step moves; None if the compiler does not say.
    """

    walks: list[str]
    layer: int
    pages: int
    temporary: int
    aliased: int
    moved: float | None


def compile_pool(pool: Pool, mesh: Mesh) -> Found:
    cfg = pool.cfg
    moe = dict(pool.moe)
    offload = OffloadConfig(**moe.pop("offload")) if "offload" in moe else None
    own = MoEConfig(**moe, offload=offload)
    sizes = Sizes((SEQUENCES,), (MIXED,), PAGE, pool.pages, TABLE)
    if pool.copies:
        compiled = lower_copy(cfg, own, mesh, sizes).compile()
    else:
        compiled = lower_step(cfg, own, mesh, sizes, sequences=SEQUENCES, tokens=pool.tokens).compile()
    split = split_attention(mesh, own.attention)
    pages = pool.pages * page_bytes(cfg, split, PAGE) // split.head_ranks
    layer = pages // cfg.num_hidden_layers
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    rows = pool.pages * PAGE * kind_of(cfg, 0).cached_heads(cfg).dim  # elements of one head's keys
    return Found(
        walks(compiled.as_text(), rows),
        layer,
        pages,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        costs.get("bytes accessed"),
    )


def check(found: Found, *, counts: bool = True) -> None:
    """Asserts that nothing has a pool's size, and that bytes stay far below one layer's pages.

    The pool is vast.

    counts: whether the compiler's count of bytes is one. XLA takes a gather in a fusion for its whole operand
        on CPUs, and counts nothing on GPUs.
    """
    assert found.walks == []
    assert found.aliased >= found.pages
    assert found.temporary < found.layer / 8, found
    assert not counts or found.moved < found.layer / 8, found
