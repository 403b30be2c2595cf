"""``auto-round``: AutoRound's, in GPTQ's packing or in AWQ's, with bits by module."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jmoe.checkpoint.quantised.formats import Format
from jmoe.checkpoint.quantised.formats.awq import BITS, Awq
from jmoe.checkpoint.quantised.methods import gptq
from jmoe.checkpoint.quantised.methods.fields import Config, flag, group_size, names_in, one_of, table
from jmoe.checkpoint.quantised.methods.method import Method, Rule, listed
from jmoe.checkpoint.quantised.methods.patterns import REGEX, matcher, nearest
from jmoe.config.reading import named, shown
from jmoe.config.units import brief

GPTQ = ("auto_round:auto_gptq", "auto_round:gptq")
AWQ = ("auto_round:auto_awq", "auto_round:awq")
PLAIN = 16  # bits of a module that is not quantised
BLOCKS = ("block_name_to_quantize", "to_quant_block_names")  # the second is the older spelling


def rules(config: Config) -> Iterator[Rule]:
    whole = _as_format(config)
    exact: dict[str, Format | None] = {}
    patterns = []
    for name, changes in table(config, "extra_config").items():
        with named(f"extra_config: {brief(name)}"):
            stored = _changed(config, changes)
            if re.fullmatch(r"[\w.]+", name):
                exact[name] = stored
            else:  # a regular expression for any part of a name
                searched = matcher(f"{REGEX}.*(?:{name})")
                patterns.append(Rule(searched, stored, f"extra_config: {brief(name)}"))
    yield from listed("extra_config", exact)
    yield from patterns
    if blocks := names_in(config, *BLOCKS):
        inside = nearest(dict.fromkeys(blocks, True))
        yield Rule(lambda module: inside(module) is None, None, f"{BLOCKS[0]}: {brief(blocks)}")
    yield Rule(lambda module: True, whole, "quant_method 'auto-round'")


def _changed(config: Config, changes: Any) -> Format | None:
    """Returns the format of a module whose values differ in ``changes``; None if it is plain."""
    if not isinstance(changes, Mapping):
        raise ValueError(f"it must be an object, got {shown(changes)}")
    bits = changes.get("bits")
    return None if type(bits) is int and bits >= PLAIN else _as_format({**config, **changes})


def _as_format(config: Config) -> Format:
    """Returns the format that the numbers of a configuration describe."""
    one_of(config, "data_type", read=("int",), default="int")
    packing = one_of(config, "packing_format", "backend", read=(*GPTQ, *AWQ), default=GPTQ[0])
    if packing in GPTQ:
        return gptq.as_format(config)
    one_of(config, "bits", read=(BITS,))
    return Awq(group_size(config, "group_size"), is_symmetric=flag(config, "sym", default=True))


METHOD = Method("auto-round", rules)
OLD_METHOD = Method("intel/auto-round", rules)
