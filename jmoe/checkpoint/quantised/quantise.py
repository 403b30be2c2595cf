"""Quantises plain numbers while they load: round to nearest, one tensor at a time."""

import numpy as np
from jmoe_kernels.quantised import DTYPES, TABLES, Coding, Quantised

LARGEST = {"int8": 127.0, "e4m3": 448.0, "int4": 7.0, "e2m1": 6.0}
E2M1_EXPONENT = 2  # of the largest number of E2M1, 6 = 1.5 * 2^2


@np.errstate(over="ignore", invalid="ignore")  # numbers that are too large are refused at the end
def quantise(numbers: np.ndarray, coding: Coding) -> Quantised:
    """Returns numbers ``[..., out, in]`` quantised: each is rounded to the nearest code of its group.

    A symmetric scale makes the group's largest magnitude the largest code. With lows, a group takes the
    better of symmetric codes and of codes from its least to its greatest number, by the sum of squared
    errors. A scale in E8M0 is the power of two that the OCP Microscaling formats (v1.0, section 6.3) say.
    Raises ValueError for numbers whose scales or lows the coding's dtype cannot hold.
    """
    groups = _grouped(numbers.astype(np.float32), coding)
    symmetric = _symmetric(groups, coding)
    if not coding.has_lows:
        return _assembled(*symmetric, None, numbers.shape, coding)
    values, scales = symmetric
    lows = np.zeros_like(scales)
    other = _min_max(groups, coding)
    takes_other = _error(groups, *other) < _error(groups, values, scales, lows)
    values = np.where(takes_other[..., None], other[0], values)
    scales, lows = (np.where(takes_other, b, a) for a, b in ((scales, other[1]), (lows, other[2])))
    return _assembled(values, scales, lows, numbers.shape, coding)


def _grouped(numbers: np.ndarray, coding: Coding) -> np.ndarray:
    """Returns ``[..., groups, group]``, with zeros after the end of a row."""
    *front, inner = numbers.shape
    group = coding.group or inner
    missing = -inner % group
    padded = np.pad(numbers, [(0, 0)] * len(front) + [(0, missing)]) if missing else numbers
    return padded.reshape(*front, -1, group)


def _symmetric(groups: np.ndarray, coding: Coding) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes and scales in the dtypes of the coding."""
    top = np.abs(groups).max(axis=-1)
    if coding.scales == "uint8":
        _, exponent = np.frexp(top)  # top < 2^exponent
        scales = np.clip(exponent - 1 - E2M1_EXPONENT + 127, 0, 254).astype(np.uint8)
        divisor = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    else:
        scales = (top / LARGEST[coding.code]).astype(coding.scales)
        divisor = scales.astype(np.float32)
    safe = np.where(divisor == 0, 1, divisor)
    return _nearest(groups / safe[..., None], coding), scales


def _min_max(groups: np.ndarray, coding: Coding) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns codes, scales and lows that reach from the least to the greatest number of each group."""
    least, greatest = groups.min(axis=-1), groups.max(axis=-1)
    scales = ((greatest - least) / 15).astype(coding.scales)
    each = scales.astype(np.float32)
    lows = (least + 8 * each).astype(coding.scales)
    safe = np.where(each == 0, 1, each)
    values = _nearest((groups - lows.astype(np.float32)[..., None]) / safe[..., None], coding)
    return values, scales, lows


def _error(groups: np.ndarray, values: np.ndarray, scales: np.ndarray, lows: np.ndarray) -> np.ndarray:
    numbers = (values.astype(np.float32) - 8) * scales.astype(np.float32)[..., None]
    return np.square(numbers + lows.astype(np.float32)[..., None] - groups).sum(axis=-1)


def _nearest(scaled: np.ndarray, coding: Coding) -> np.ndarray:
    """Returns the code of the nearest number, one byte each."""
    if coding.code == "int8":
        return np.clip(np.rint(scaled), -127, 127).astype(np.int8)
    if coding.code == "e4m3":
        return np.clip(scaled, -LARGEST["e4m3"], LARGEST["e4m3"]).astype(DTYPES["e4m3"])
    if coding.code == "int4":
        return (np.clip(np.rint(scaled), -8, 7) + 8).astype(np.uint8)
    order = np.argsort(TABLES[coding.code], kind="stable")
    table = np.array(TABLES[coding.code], np.float32)[order]
    middles = (table[1:] + table[:-1]) / 2
    return order[np.searchsorted(middles, scaled)].astype(np.uint8)


def _assembled(
    values: np.ndarray, scales: np.ndarray, lows: np.ndarray | None, shape: tuple[int, ...], coding: Coding
) -> Quantised:
    for per_group in (scales, lows):
        if per_group is not None and not np.isfinite(per_group.astype(np.float32)).all():
            raise ValueError(f"its numbers are too large for {coding.scales} scales ({coding})")
    *front, inner = shape
    codes = np.ascontiguousarray(values.reshape(*front, -1)[..., :inner])
    if coding.num_packed == 2:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return Quantised(codes, scales, lows, coding, "float32")
