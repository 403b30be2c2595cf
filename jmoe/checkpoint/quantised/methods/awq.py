"""``awq``: AutoAWQ's "gemm" packing; the other packings are for one GPU kernel each."""

from collections.abc import Iterator

from jmoe.checkpoint.quantised.formats.awq import BITS, Awq
from jmoe.checkpoint.quantised.methods.fields import Config, flag, group_size, names_in, one_of
from jmoe.checkpoint.quantised.methods.method import Method, Rule
from jmoe.checkpoint.quantised.methods.patterns import contains
from jmoe.config.reading import shown
from jmoe.config.units import brief


def rules(config: Config) -> Iterator[Rule]:
    version = config.get("version") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise ValueError(f"version {shown(version)} is not read, 'gemm' is")
    one_of(config, "backend", read=("autoawq",), default="autoawq")
    one_of(config, "bits", "w_bit", read=(BITS,))
    stored = Awq(
        group_size(config, "group_size", "q_group_size"),
        is_symmetric=not flag(config, "zero_point", default=True),
    )
    for entry in names_in(config, "modules_to_not_convert"):
        yield Rule(contains(entry), None, f"modules_to_not_convert: {brief(entry)}")
    yield Rule(lambda module: True, stored, "quant_method 'awq'")


METHOD = Method("awq", rules)
