"""Tests that docs/techniques.md has every key of the techniques, its default, and valid examples."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from jmoe.config.moe import TRAINING, MoEConfig

TEXT = (Path(__file__).parents[2] / "docs" / "techniques.md").read_text(encoding="utf-8")
TABLES = {  # the tables of the techniques, by their keys in ``[moe]``
    name: table
    for name, declared in get_type_hints(MoEConfig).items()
    for table in get_args(declared)
    if dataclasses.is_dataclass(table)
}
REQUIRED = {("shuffle", "placement")}  # fields whose default is refused
EXAMPLES = re.findall(r"^```toml\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def documented(title: str) -> dict[str, str]:
    """Returns the defaults by key of the section whose heading names the table."""
    section = re.split(r"^## ", TEXT, flags=re.MULTILINE)
    [found] = [part for part in section if part.partition("\n")[0].endswith(f"`[{title}]`")]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \| .* \|$", found, re.MULTILINE))


def default(table: str, field: dataclasses.Field) -> str:
    if (table, field.name) in REQUIRED:
        return "required"
    return "none" if field.default is None else f"`{json.dumps(field.default)}`"


@pytest.mark.parametrize("name", TABLES)
def test_the_table_of_a_technique_has_its_keys_and_defaults(name: str):
    fields = dataclasses.fields(TABLES[name])
    assert documented(f"moe.{name}") == {field.name: default(name, field) for field in fields}


def test_the_table_of_the_layer_has_its_keys_and_defaults():
    other = {*TABLES, "attention"}  # tables of their own, and a flag
    fields = [
        field
        for field in dataclasses.fields(MoEConfig)
        if field.name not in other and field.metadata.get("mode") != TRAINING["mode"]
    ]
    assert documented("moe") == {field.name: default("", field) for field in fields}


def test_each_technique_has_an_example_that_is_read():
    configs = [MoEConfig.from_dict(tomllib.loads(text)) for text in EXAMPLES]
    shown = [name for config in configs for name in TABLES if getattr(config, name) is not None]
    assert shown == list(TABLES)
