"""Writers of modelopt's NVFP4 and eight-bit floats, apart from the readers, and their numbers in float32."""

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn

Written = tuple[dict[str, np.ndarray], np.ndarray]


def nvfp4(rng: np.random.Generator, shape: tuple[int, int]) -> Written:
    """Returns the tensors of a random weight, and its numbers: each scale is rounded to float32 once."""
    n, k = shape
    codes = rng.integers(0, 16, shape)
    scales = rng.uniform(16, 448, (n, k // 16)).astype(E4M3)
    whole = np.float32(rng.uniform(0.5, 1) / 448 / 3 / k**0.5)
    half, exponent = codes & 1, codes >> 1 & 3
    magnitude = np.where(exponent == 0, half / 2, (1 + half / 2) * 2.0 ** (exponent - 1))
    folded = (scales.astype(np.float64) * float(whole)).astype(np.float32)
    numbers = np.where(codes >> 3, -magnitude, magnitude) * np.repeat(folded.astype(np.float64), 16, 1)
    tensors = {
        "weight": (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8),
        "weight_scale": scales,
        "weight_scale_2": np.array(whole),
        "input_scale": np.array(0.25, np.float32),
    }
    return tensors, numbers.astype(np.float32)


def fp8(rng: np.random.Generator, shape: tuple[int, int]) -> Written:
    """Returns the tensors of a random weight with one scale, and its numbers."""
    codes = rng.uniform(-448, 448, shape).astype(E4M3)
    scale = np.float32(rng.uniform(0.5, 1) / 448 / shape[1] ** 0.5)
    numbers = (codes.astype(np.float64) * float(scale)).astype(np.float32)
    tensors = {"weight": codes, "weight_scale": np.array(scale), "input_scale": np.array(0.5, np.float32)}
    return tensors, numbers


def mxfp8(rng: np.random.Generator, shape: tuple[int, int]) -> Written:
    """Returns the tensors of a random weight with a power of two for 32 numbers, and its numbers."""
    codes = rng.uniform(-448, 448, shape).astype(E4M3)
    scales = rng.integers(113, 116, (shape[0], shape[1] // 32), np.uint8)
    numbers = codes.astype(np.float64) * np.repeat(2.0 ** (scales.astype(int) - 127), 32, 1)
    return {"weight": codes, "weight_scale": scales}, numbers.astype(np.float32)
