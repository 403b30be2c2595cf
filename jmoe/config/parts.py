"""Frozen configuration of the parts that model families build differently: router, rotary embedding, latent
attention. Field names are Hugging Face's if there is one."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from jmoe.config.reading import Positive, check_fields

SIZE_LIMIT = 2**31 - 1  # array dimensions and token ids are int32
Count = Annotated[int, Meta(ge=1, le=SIZE_LIMIT, description="a positive integer")]
NotNegative = Annotated[
    float, Meta(ge=0, le=2.0**127, description="a finite number of at least 0", extra={"float32": True})
]
ScoringFunc = Literal["softmax", "sigmoid", "sparsemixer"]
RopeType = Literal["default", "linear", "yarn", "longrope", "llama3"]


@dataclass(frozen=True)
class RouterConfig:
    """The way in which a layer's router turns logits into experts and weights (see ``jmoe.moe.routing``).

    scoring_func: function from logits to scores.
    norm_topk_prob: whether a token's weights are normalised to sum to 1 before scaling.
    n_group, topk_group: number of groups, and of a token's best groups: only their experts may be chosen.
    group_score: score of a group: that of its best expert ("max") or the sum of its best two ("top2").
    bias: whether a bias is added to the logits.
    correction_bias: whether a bias is added to the scores for the choice only, not for the weights.
    routed_scaling_factor: factor of all weights.
    router_jitter_noise: for "sparsemixer", half the relative distance within which experts share a softmax.
    weigh_input: whether a weight multiplies its expert's input, not its output.
    """

    scoring_func: ScoringFunc = "softmax"
    norm_topk_prob: bool = True
    n_group: Count = 1
    topk_group: Count = 1
    group_score: Literal["max", "top2"] = "max"
    bias: bool = False
    correction_bias: bool = False
    routed_scaling_factor: Positive = 1.0
    router_jitter_noise: NotNegative = 0.0
    weigh_input: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, experts: int, k: int) -> None:
        """Raises ValueError if the router does not fit ``experts`` experts with ``k`` per token."""
        if experts % self.n_group:
            raise ValueError(f"n_group {self.n_group} does not divide num_experts {experts}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group must be from 1 to n_group {self.n_group}, got {self.topk_group}")
        per_group = experts // self.n_group
        if self.topk_group * per_group < k:
            raise ValueError(
                f"topk_group {self.topk_group} groups have {self.topk_group * per_group} experts, "
                f"below num_experts_per_tok {k}"
            )
        if self.group_score == "top2" and self.n_group > 1 and per_group < 2:
            raise ValueError(f"n_group {self.n_group} leaves {per_group} expert a group; its two best count")
        if self.scoring_func == "sparsemixer" and k != 2:
            raise ValueError(f"the sparse mixer chooses 2 experts, num_experts_per_tok is {k}")

    @property
    def is_plain(self) -> bool:
        """Whether the router is a softmax and a top-k of the logits, which the fused kernels implement."""
        other = dataclasses.replace(self, bias=False, weigh_input=False, router_jitter_noise=0.0)
        return other == RouterConfig(norm_topk_prob=self.norm_topk_prob)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (see ``jmoe.nn.rope``). All fields after the first four apply to some types
    only. A pair is two dimensions of a head that rotate together.

    rope_theta: base of the pairs' frequencies.
    rope_type: type of the extension to long contexts; "default" is none.
    partial_rotary_factor: share of a head that is rotated.
    interleaved: whether pairs are neighbouring dimensions, not the two halves.
    factor: divisor of the frequencies: of all pairs for "linear", of slow pairs for "yarn" and "llama3". For
        "yarn" and "longrope", the factor of cos and sin is computed from it.
    original_max_position_embeddings: tokens of the context before its extension.
    attention_factor: for "yarn" and "longrope", factor of cos and sin; None computes it.
    beta_fast: for "yarn", pairs with more full turns in the original context keep their frequency.
    beta_slow: for "yarn", pairs with fewer full turns in the original context are slowed down by ``factor``.
    mscale, mscale_all_dim: for "yarn", two weights from which the factor of cos and sin is computed if both
        are set; DeepSeek's attention also scales its products by the second.
    truncate: for "yarn", whether the range between fast and slow pairs begins and ends at whole pairs.
    short_factor: for "longrope", divisor of each pair's frequency within the original context.
    long_factor: for "longrope", divisor of each pair's frequency in longer contexts.
    short_mscale: for "longrope", factor of cos and sin with ``short_factor``; None computes it.
    long_mscale: for "longrope", factor of cos and sin with ``long_factor``; None computes it.
    low_freq_factor: for "llama3", pairs with fewer turns in the original context are slowed by ``factor``.
    high_freq_factor: for "llama3", pairs with more turns in the original context keep their frequency.
    long: for "longrope", whether the engine serves contexts longer than the original ones; then all positions
        are rotated by the long factors, because cached keys cannot change.
    """

    rope_theta: Positive = 10000.0
    rope_type: RopeType = "default"
    partial_rotary_factor: Positive = 1.0
    interleaved: bool = False
    factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None
    truncate: bool = True
    short_factor: tuple[Positive, ...] = ()
    long_factor: tuple[Positive, ...] = ()
    short_mscale: Positive | None = None
    long_mscale: Positive | None = None
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    long: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def for_context(self, tokens: int) -> "RopeConfig":
        """Returns the config for an engine that serves contexts of ``tokens`` tokens."""
        original = self.original_max_position_embeddings
        long = self.rope_type == "longrope" and original is not None and tokens > original
        return dataclasses.replace(self, long=long)

    def check(self, dim: int) -> None:
        """Raises ValueError if the config cannot rotate heads of size ``dim``."""
        rotated = int(dim * self.partial_rotary_factor)
        if not 0 < rotated <= dim or rotated % 2:
            raise ValueError(
                f"rotary embeddings need an even number of a head's {dim} dimensions, "
                f"partial_rotary_factor {self.partial_rotary_factor} gives {rotated}"
            )
        if self.rope_type in ("yarn", "longrope", "llama3") and not self.original_max_position_embeddings:
            raise ValueError(f"rope type {self.rope_type!r} needs original_max_position_embeddings")
        if self.rope_type in ("linear", "yarn", "llama3") and self.factor is None:
            raise ValueError(f"rope type {self.rope_type!r} needs a factor above 0, got None")
        # both are used in a logarithm that is a divisor
        if self.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope type 'yarn' needs a rope_theta above 1, got {self.rope_theta}")
        if self.rope_type == "longrope" and self.original_max_position_embeddings == 1:
            raise ValueError("rope type 'longrope' needs original_max_position_embeddings above 1, got 1")
        for name in ("short_factor", "long_factor"):
            if self.rope_type == "longrope" and len(getattr(self, name)) != rotated // 2:
                raise ValueError(f"{name} must have {rotated // 2} numbers, got {len(getattr(self, name))}")


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). All sizes are element counts.

    kv_lora_rank: size of the cached latent for all heads' keys and values.
    qk_nope_head_dim: size of the part of a head's key that is not rotated.
    qk_rope_head_dim: size of the part of a key that is rotated; all heads share it.
    v_head_dim: size of a head's value.
    q_lora_rank: size of the compressed queries; None if they are not compressed.
    """

    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count
    q_lora_rank: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached_dim(self) -> int:
        """The number of cached values per token."""
        return self.kv_lora_rank + self.qk_rope_head_dim
