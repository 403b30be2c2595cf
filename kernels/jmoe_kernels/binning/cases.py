"""Named batches that tests and benchmarks share."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Fill = Callable[[np.random.Generator, np.ndarray, np.ndarray, np.ndarray], None]
Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A batch: normal logits, no padding, all tokens lossy, and then the changes that ``fill`` makes.

    name: what is special about the batch.
    tokens: number of tokens.
    experts: number of experts.
    k: number of experts that a token chooses.
    fill: function of (rng, logits_TE, valid_T, lossy_T) that changes the arrays in place.
    """

    name: str
    tokens: int
    experts: int
    k: int
    fill: Fill = lambda rng, logits, valid, lossy: None


def _padding(rng: np.random.Generator, logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray) -> None:
    valid[1::3] = False


def _all_padding(rng: np.random.Generator, logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray) -> None:
    valid[:] = False


def _exact(rng: np.random.Generator, logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray) -> None:
    lossy[:] = False


def _some_exact(rng: np.random.Generator, logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray) -> None:
    lossy[rng.random(len(lossy)) < 0.2] = False
    valid[5::7] = False


def _equal(rng: np.random.Generator, logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray) -> None:
    logits[:] = 0.25


def _identical(rng: np.random.Generator, logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray) -> None:
    logits[:] = logits[0]


def _unanimous(rng: np.random.Generator, logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray) -> None:
    """Puts expert 3 within [0.5, 1) of every token's best logit; two tokens each share their best expert."""
    logits *= 0.1
    logits[:, 3] = 9.3
    logits[np.arange(len(logits)), 4 + np.arange(len(logits)) // 2] = 10


def _on_the_edges(rng: np.random.Generator, logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray) -> None:
    """Rounds the logits to halves: gaps lie where bins of that width begin, and many logits tie."""
    logits[:] = np.round(logits * 2) / 2


def _huge_gaps(rng: np.random.Generator, logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray) -> None:
    """Makes all scores but a token's best 0; some logits are the largest and the smallest of float32."""
    logits[:] = np.argsort(logits, axis=1) * 150.0
    logits[2, 5], logits[3, 6] = np.finfo(np.float32).max, np.finfo(np.float32).min


def _minus_infinity(
    rng: np.random.Generator, logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray
) -> None:
    """Leaves a token six or two finite logits: some of its k experts have a score of 0."""
    logits[:, 6:] = -np.inf
    logits[::2, 2:] = -np.inf


def _not_a_number(rng: np.random.Generator, logits: np.ndarray, valid: np.ndarray, lossy: np.ndarray) -> None:
    """Puts NaN into one logit of a lossy token, into all those of an exact one, and into padding."""
    logits[4, 7], logits[6], logits[8] = np.nan, np.nan, np.nan
    lossy[6], valid[8] = False, False


SMALL = 12, 20, 4  # tokens, experts, k of the cases that differ in content alone
CASES = (
    Case("normal", *SMALL),
    Case("padding between tokens", *SMALL, _padding),
    Case("all padding", *SMALL, _all_padding),
    Case("all exact", *SMALL, _exact),
    Case("exact among lossy", *SMALL, _some_exact),
    Case("equal logits", *SMALL, _equal),
    Case("identical tokens", *SMALL, _identical),
    Case("unanimous in bin 1", *SMALL, _unanimous),
    Case("gaps on the edges of bins", *SMALL, _on_the_edges),
    Case("huge gaps", *SMALL, _huge_gaps),
    Case("logits of minus infinity", *SMALL, _minus_infinity),
    Case("a NaN token", *SMALL, _not_a_number),
    Case("one token", 1, 20, 4),
    Case("k = E", 6, 9, 9, _padding),
    Case("odd sizes", 37, 130, 3, _some_exact),
    Case("several tiles", 70, 128, 8, _some_exact),
    Case("Mixtral batch 4", 4, 8, 2),
    Case("OLMoE batch 16", 16, 64, 8, _some_exact),
    Case("Qwen3-30B batch 64", 64, 128, 8, _some_exact),
)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Returns (logits, valid, lossy) as float32, bool and bool arrays; lossy tokens are valid."""
    rng = np.random.default_rng(seed)
    logits_TE = 2 * rng.standard_normal((case.tokens, case.experts), np.float32)
    valid_T, lossy_T = np.ones(case.tokens, bool), np.ones(case.tokens, bool)
    case.fill(rng, logits_TE, valid_T, lossy_T)
    return logits_TE, valid_T, lossy_T & valid_T
