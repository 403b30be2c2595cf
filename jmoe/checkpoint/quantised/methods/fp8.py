"""``fp8``: DeepSeek's and Qwen's E4M3 in blocks, without lists or with ``modules_to_not_convert``."""

from collections.abc import Iterator, Mapping
from typing import Any

from jmoe.checkpoint.quantised.formats.fp8 import Fp8
from jmoe.checkpoint.quantised.formats.grids import LARGEST
from jmoe.checkpoint.quantised.methods.method import Method, Rule
from jmoe.checkpoint.quantised.methods.patterns import matcher, patterns
from jmoe.config.reading import shown


def rules(config: Mapping[str, Any]) -> Iterator[Rule]:
    if (fmt := config.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise ValueError(f"fmt {shown(fmt)} is not read, 'e4m3' is")
    if (scale := config.get("scale_fmt")) not in (None, "float", "ue8m0"):
        raise ValueError(f"scale_fmt {shown(scale)} is not read, 'ue8m0' is")
    block = config.get("weight_block_size")
    if block is None:
        raise ValueError("weight_block_size is absent; fp8 is read in blocks")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or any(type(n) is not int or not 1 <= n <= LARGEST for n in block)
    ):
        raise ValueError(f"weight_block_size must be two numbers from 1 to {LARGEST}, got {shown(block)}")
    for key in ("modules_to_not_convert", "ignored_layers"):
        for entry in patterns(config, key):
            yield Rule(matcher(entry), None, f"{key}: {entry!r}")
    yield Rule(lambda module: True, Fp8((block[0], block[1]), "_scale_inv"), "weight_block_size")


METHOD = Method("fp8", rules)
