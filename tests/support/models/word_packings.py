"""Writers of GPTQ's and AWQ's packings, apart from the readers: each word is put together with shifts."""

from dataclasses import dataclass

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each nibble of a word, from the lowest on


@dataclass(frozen=True)
class Codes:
    """A weight ``[N, K]`` as codes.

    codes: codes ``[N, K]``.
    zeros, scales: per group, ``[N, G]``.
    g_idx: group of each column, ``[K]``.
    bits: bits of a code.
    """

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    g_idx: np.ndarray
    bits: int

    @property
    def numbers(self) -> np.ndarray:
        """The weight as float32, computed in float64."""
        zeros, scales = (a.astype(np.float64)[:, self.g_idx] for a in (self.zeros, self.scales))
        exact = (self.codes.astype(np.float64) - zeros) * scales
        assert (exact.astype(np.float32) == exact).all()
        return exact.astype(np.float32)


def random_codes(
    rng: np.random.Generator, shape: tuple[int, int], bits: int = 4, group: int = 16, sym: bool = True
) -> Codes:
    """Returns a random weight with every zero from 0 to the greatest code, or with the middle one.

    group: columns that share a scale; -1 is the whole row.
    """
    n, k = shape
    g_idx = np.arange(k) // (k if group == -1 else group)
    per_group = (n, int(g_idx[-1]) + 1)
    zeros = np.full(per_group, 2 ** (bits - 1)) if sym else rng.integers(0, 2**bits, per_group)
    scales = rng.uniform(0.2, 1, per_group) * 4 / 2**bits / k**0.5
    return Codes(rng.integers(0, 2**bits, shape), zeros, scales.astype(np.float16), g_idx, bits)


def shuffled(codes: Codes, rng: np.random.Generator) -> Codes:
    """Returns a weight whose columns have groups in any order, as ``desc_act`` leaves them."""
    return Codes(codes.codes, codes.zeros, codes.scales, rng.permutation(codes.g_idx), codes.bits)


def gptq(weight: Codes, *, less_one: bool = True, g_idx: bool = True) -> dict[str, np.ndarray]:
    """Returns the tensors of GPTQ's first version, or of its second without ``less_one``."""
    zeros = (weight.zeros.T - less_one) % 2**weight.bits
    tensors = {
        "qweight": _words(weight.codes.T, 0, weight.bits),
        "qzeros": _words(zeros, 1, weight.bits),
        "scales": np.ascontiguousarray(weight.scales.T),
    }
    return tensors | ({"g_idx": weight.g_idx.astype(np.int32)} if g_idx else {})


def awq(weight: Codes) -> dict[str, np.ndarray]:
    """Returns the tensors of AWQ's "gemm" packing."""
    return {
        "qweight": _words(_interleaved(weight.codes.T), 1, 4),
        "qzeros": _words(_interleaved(weight.zeros.T), 1, 4),
        "scales": np.ascontiguousarray(weight.scales.T),
    }


def _interleaved(codes: np.ndarray) -> np.ndarray:
    out = np.empty_like(codes)
    for word in range(codes.shape[1] // 8):
        for nibble, column in enumerate(AWQ_ORDER):
            out[:, 8 * word + nibble] = codes[:, 8 * word + column]
    return out


def _words(codes: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """Returns neighbouring codes along an axis as words, the first in the lowest bits."""
    moved = np.moveaxis(codes, axis, -1).astype(np.uint32)
    per_word = 32 // bits
    words = np.zeros((*moved.shape[:-1], moved.shape[-1] // per_word), np.uint32)
    for place in range(per_word):
        words |= moved[..., place::per_word] << np.uint32(bits * place)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)
