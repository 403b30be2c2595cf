"""``modelopt``: NVIDIA's NVFP4 and eight-bit floats, in one form or in a mixture by module.

Older releases say so in ``hf_quant_config.json`` alone, newer ones in both files. Their scales of activations
and of cached keys and values are not needed for products of weights, so they are not read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jmoe.checkpoint.quantised.formats import Format
from jmoe.checkpoint.quantised.formats.fp8 import Fp8
from jmoe.checkpoint.quantised.formats.nvfp4 import BLOCK, Nvfp4
from jmoe.checkpoint.quantised.methods.fields import Config, first, names_in, one_of, table
from jmoe.checkpoint.quantised.methods.method import Method, Rule, Twin, listed
from jmoe.checkpoint.quantised.methods.patterns import matcher
from jmoe.config.reading import named, shown
from jmoe.config.units import brief

NVFP4 = Nvfp4("_scale", "_scale_2", multiplies=True)
# algorithm -> format, and the numbers that share a scale, if the file may say it
READ: dict[str, tuple[Format, int | None]] = {
    "NVFP4": (NVFP4, BLOCK),
    "W4A16_NVFP4": (NVFP4, BLOCK),
    "FP8": (Fp8((None, None), "_scale"), None),
    "MXFP8": (Fp8((1, 32), "_scale", keeps_bytes=True), 32),
}
MIXED = "MIXED_PRECISION"
LISTS = ("ignore", "exclude_modules")


def rules(config: Config) -> Iterator[Rule]:
    algorithm = config.get("quant_algo")
    if algorithm is None:  # the cache alone is quantised
        return
    whole = None if algorithm == MIXED else as_format(config)
    for entry in names_in(config, *LISTS):
        yield Rule(matcher(entry), None, f"{_key(config)}: {brief(entry)}")
    if whole is not None:
        yield Rule(lambda module: True, whole, f"quant_algo {algorithm!r}")
        return
    modules = table(config, "quantized_layers")
    if not modules:
        raise ValueError(f"quantized_layers is absent, which quant_algo {MIXED!r} needs")
    yield from listed("quantized_layers", {name: _module(name, own) for name, own in modules.items()})


def as_format(config: Config) -> Format:
    """Returns the format of an algorithm, of the whole model or of one module."""
    algorithm = one_of(config, "quant_algo", read=tuple(READ))
    stored, group = READ[algorithm]
    if group is not None and (given := first(config, "group_size", default=group)) != group:
        raise ValueError(f"group_size {shown(given)} is not read for {algorithm}, {group} is")
    return stored


def _module(name: str, own: Any) -> Format | None:
    with named(f"quantized_layers: {brief(name)}"):
        if not isinstance(own, Mapping):
            raise ValueError(f"it must be an object, got {shown(own)}")
        return None if own.get("quant_algo") in (None, "UNQUANTIZED") else as_format(own)


def _key(config: Config) -> str:
    """Returns the key under which the file lists plain modules."""
    return next((key for key in LISTS if config.get(key) is not None), LISTS[0])


def _check(config: Config, twin: Config) -> None:
    """Raises ValueError if the two files name other algorithms or other modules."""
    for key in ("quant_algo", "quantized_layers"):
        ours, theirs = config.get(key), twin.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(f"{key} is {shown(ours)}, but {TWIN.file} says {shown(theirs)}")
    lists = [set(names_in(each, *LISTS)) for each in (config, twin) if _has_list(each)]
    if len(lists) == 2 and (other := sorted(lists[0] ^ lists[1])):
        where = ("quantization_config", TWIN.file)[other[0] in lists[1]]
        raise ValueError(f"{_key(config)} and {TWIN.file} differ: only {where} lists {brief(other[0])}")


def _has_list(config: Config) -> bool:
    return any(config.get(key) is not None for key in LISTS)


TWIN = Twin(
    "hf_quant_config.json", "quantization", lambda value: {"quant_method": "modelopt", **value}, _check
)
METHOD = Method("modelopt", rules, TWIN)
