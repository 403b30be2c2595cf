"""``mxfp4``: gpt-oss' experts; everything else is plain."""

from collections.abc import Iterator, Mapping
from typing import Any

from jmoe.checkpoint.quantised.formats.mxfp4 import IN_BLOCKS
from jmoe.checkpoint.quantised.methods.method import Method, Rule
from jmoe.checkpoint.quantised.methods.patterns import matcher, patterns

EXPERTS = matcher("re:.*\\.experts\\.(gate_up|down)_proj$")


def rules(config: Mapping[str, Any]) -> Iterator[Rule]:
    for entry in patterns(config, "modules_to_not_convert"):
        yield Rule(matcher(entry), None, f"modules_to_not_convert: {entry!r}")
    yield Rule(EXPERTS, IN_BLOCKS, "quant_method 'mxfp4'")


METHOD = Method("mxfp4", rules)
