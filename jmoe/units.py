"""Sizes as people write them. Imports nothing: the command line reads them before anything heavy."""

import re

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(name: str, text: str) -> int:
    """Bytes of "2GiB", "512 MiB" or a plain number; ValueError in one line."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not match or match[2] not in UNITS:
        raise ValueError(f"{name}: {text!r} is not a size such as 2GiB or 512MiB")
    return int(float(match[1]) * UNITS[match[2]])
