"""Sizes in the form that people write, errors in the form that people read. This module imports nothing
heavy, because the command line reads sizes before it imports anything heavy."""

import re
from fractions import Fraction

_SMALL = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
UNITS = _SMALL | {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}


def parse_size(name: str, text: str) -> int:
    """Returns the number of bytes in "2GiB", "512 MiB" or a plain number; a ValueError has one line."""
    match = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)", text)
    if not match or match[2] not in UNITS:
        raise ValueError(f"{name}: {text[:80]!r} is not a size such as 2GiB or 512MiB")
    return int(Fraction(match[1]) * UNITS[match[2]])


def cause(error: BaseException) -> str:
    """Returns the message of a library's exception in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def brief(value: object) -> str:
    """Returns a value from a file as short text for a message."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def readable(size: float) -> str:
    """Returns bytes in the largest unit that does not exceed them, rounded to three digits or to a whole
    number: "1.95 GiB"."""
    unit = next((u for u in ("PiB", "TiB", "GiB", "MiB", "KiB") if size >= UNITS[u]), "B")
    amount = size / UNITS[unit]
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.3g} {unit}"
