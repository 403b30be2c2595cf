"""``gptq``: AutoGPTQ's and GPTQModel's, 4 and 8 bits, with ``dynamic`` rules of single modules."""

from collections.abc import Iterator, Mapping
from typing import Any

from jmoe.checkpoint.quantised.formats.gptq import CODES, Gptq
from jmoe.checkpoint.quantised.methods.fields import Config, flag, group_size, names_in, one_of, table
from jmoe.checkpoint.quantised.methods.method import Method, Rule
from jmoe.checkpoint.quantised.methods.patterns import REGEX, matcher
from jmoe.config.reading import named, shown
from jmoe.config.units import brief

PLAIN, CODED = "-:", "+:"  # beginnings of the keys of "dynamic"; without one, a key is as with the second
# keys of things that would change the numbers or their packing
UNREAD = ("is_marlin_format", "rotation", "adapter")


def rules(config: Config) -> Iterator[Rule]:
    for key in UNREAD:
        if config.get(key):
            raise ValueError(f"{key} {shown(config[key])} is not read")
    one_of(config, "pack_dtype", read=("int32",), default="int32")
    whole = as_format(config)
    for key, changes in table(config, "dynamic").items():
        yield _dynamic(key, changes, config)
    if not flag(config, "lm_head", default=False):
        yield Rule(matcher("lm_head"), None, "lm_head: false")
    for entry in names_in(config, "modules_to_not_convert"):
        yield Rule(matcher(entry), None, f"modules_to_not_convert: {brief(entry)}")
    chosen = names_in(config, "modules_in_block_to_quantize")
    if not chosen:
        yield Rule(lambda module: True, whole, "quant_method 'gptq'")
        return
    ends = tuple(f".{name}" for name in chosen)
    yield Rule(lambda module: module.endswith(ends), whole, "modules_in_block_to_quantize")
    yield Rule(lambda module: True, None, "modules_in_block_to_quantize")


def as_format(config: Config) -> Gptq:
    """Returns the format that the numbers of a configuration describe."""
    version = one_of(config, "checkpoint_format", "format", read=("gptq", "gptq_v2"), default="gptq")
    return Gptq(
        one_of(config, "bits", read=tuple(CODES)),
        group_size(config, "group_size"),
        is_symmetric=flag(config, "sym", default=True),
        stores_less_one=version == "gptq",
        has_any_order=flag(config, "desc_act", default=False),
    )


def _dynamic(key: str, changes: Any, config: Config) -> Rule:
    """Returns the rule of one entry of "dynamic": a regular expression and the values that differ."""
    text = f"dynamic: {brief(key)}"
    pattern = REGEX + key.removeprefix(PLAIN).removeprefix(CODED)
    with named(text):
        if key.startswith(PLAIN):
            return Rule(matcher(pattern), None, text)
        if changes is True:  # as some write it
            changes = {}
        if not isinstance(changes, Mapping):
            raise ValueError(f"it must be an object, got {shown(changes)}")
        return Rule(matcher(pattern), as_format({**config, **changes}), text)


METHOD = Method("gptq", rules)
