"""Every kind of router that a family has, and what each chooses, one token at a time in float64.

It is written from the definitions: DeepSeek-V2 (arXiv 2405.04434, section 2.2.2), DeepSeek-V3 (arXiv
2412.19437, section 2.1.2) and its published ``inference/model.py``, Phi-3.5-MoE's published ``sparsemixer``
without its training noise, gpt-oss's softmax over the chosen alone, Llama 4's sigmoid of the one best logit.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from jmoe.config.parts import RouterConfig
from jmoe.moe.routing import route

EXPERTS = 16


@dataclass(frozen=True)
class Variant:
    """A kind of router.

    name: name of the kind.
    router: configuration of the router.
    k: number of experts that a token chooses.
    layer: what else of a layer's configuration its family has.
    """

    name: str
    router: RouterConfig
    k: int = 4
    layer: dict[str, Any] = field(default_factory=dict, hash=False)

    def correction(self, seed: int = 0) -> np.ndarray | None:
        """Returns a correction that is large enough to change choices."""
        if not self.router.correction_bias:
            return None
        return np.random.default_rng(seed).normal(0, 0.2, EXPERTS).astype(np.float32)


def _softmax(**changes) -> RouterConfig:
    return RouterConfig(**changes)


def _balanced(**changes) -> RouterConfig:
    base = {"scoring_func": "sigmoid", "correction_bias": True, "group_score": "top2"}
    return RouterConfig(**base | {"routed_scaling_factor": 2.5} | changes)


def _mixer(jitter: float) -> RouterConfig:
    return RouterConfig(scoring_func="sparsemixer", norm_topk_prob=False, router_jitter_noise=jitter)


_V2 = {"norm_topk_prob": False, "routed_scaling_factor": 1.7}
_GPT_OSS = {"expert_bias": True, "hidden_act": "swiglu_oai"}
VARIANTS = {
    v.name: v
    for v in (
        Variant("mixtral", _softmax()),
        Variant("olmoe", _softmax(norm_topk_prob=False)),
        Variant("gpt-oss", _softmax(bias=True), layer=_GPT_OSS),
        Variant("deepseek-v2", _softmax(n_group=4, topk_group=2, **_V2)),
        Variant("deepseek-v2-lite", _softmax(**_V2)),
        Variant("deepseek-v3", _balanced(n_group=4, topk_group=2)),
        Variant("deepseek-v3-unnormalised", _balanced(n_group=4, topk_group=3, norm_topk_prob=False)),
        Variant("deepseek-v3-no-choice", _balanced(n_group=8, topk_group=2)),  # k experts in the open groups
        Variant("glm", _balanced(routed_scaling_factor=1.5)),
        Variant("phi", _mixer(0.01), k=2),
        Variant("phi-wide", _mixer(0.2), k=2),
        Variant("llama4", RouterConfig("sigmoid", norm_topk_prob=False, weigh_input=True), k=1),
    )
}
GROUPED = [name for name, v in VARIANTS.items() if v.router.n_group > 1]


@lru_cache
def compiled(variant: Variant):
    """Returns the router as a jitted function (logits, correction, expert numbers) -> Routing."""
    return jax.jit(lambda *args: route(args[0], variant.k, variant.router, *args[1:]))


def best(values: np.ndarray, among: Iterable[int], count: int) -> list[int]:
    """Returns the ids of the highest values; ties go to the lower id."""
    return sorted(among, key=lambda e: (-values[e], e))[:count]


def shares(logits: np.ndarray, among: list[int]) -> np.ndarray:
    """Returns a softmax over the experts ``among``."""
    powers = np.exp(logits[among] - logits[among].max())
    return powers / powers.sum()


def open_experts(values: np.ndarray, router: RouterConfig) -> list[int]:
    """Returns the experts of the best groups; a group counts by its best expert or by its two best."""
    groups = np.arange(len(values)).reshape(router.n_group, -1)
    counted = 2 if router.group_score == "top2" else 1
    worth = np.array([np.sort(values[group])[-counted:].sum() for group in groups])
    return sorted(groups[best(worth, range(len(groups)), router.topk_group)].ravel().tolist())


def mix_sparsely(logits: np.ndarray, k: int, jitter: float) -> tuple[list[int], list[float]]:
    left, ids, weights = list(range(len(logits))), [], []
    for _ in range(k):
        (e,) = best(logits, left, 1)
        top = logits[e]
        near = [i for i in left if top - logits[i] <= 2 * jitter * max(abs(logits[i]), top)]
        ids.append(e)
        weights.append(float(shares(logits, near)[near.index(e)]))
        left.remove(e)
    return ids, weights


def choose(
    variant: Variant, logits: np.ndarray, correction: np.ndarray | None = None
) -> tuple[list[int], np.ndarray, list[int]]:
    """Returns (ids, weights, experts that were open) of one token."""
    router, everyone = variant.router, list(range(len(logits)))
    logits = logits.astype(np.float64)
    if router.scoring_func == "sparsemixer":
        ids, weights = mix_sparsely(logits, variant.k, router.router_jitter_noise)
        return ids, np.array(weights), everyone
    scores = shares(logits, everyone)
    if router.scoring_func == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    wanted = scores if correction is None else scores + correction
    opened = open_experts(wanted, router) if router.n_group > 1 else everyone
    ids = best(wanted, opened, variant.k)
    weights = scores[ids]
    if router.norm_topk_prob:
        weights = weights / weights.sum() if router.scoring_func == "sigmoid" else shares(logits, ids)
    return ids, weights * router.routed_scaling_factor, opened
