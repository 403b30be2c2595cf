"""The format of a model's calls, as it is set or as its template shows it."""

import logging
from collections.abc import Mapping
from pathlib import Path

from jmoe.engine.text.tokenizer_files import read_config
from jmoe.server.dialects.detect import AUTO, NONE, Detected, detect
from jmoe.server.dialects.files import format_file
from jmoe.server.dialects.format import Format
from jmoe.server.dialects.formats import FORMATS
from jmoe.server.dialects.response_template import ResponseTemplate
from jmoe.server.template.chat_template import ChatTemplate
from jmoe.server.template.probe import TOOL

log = logging.getLogger(__name__)


def tool_format(
    template: ChatTemplate | None, setting: str = AUTO, declared: Format | None = None
) -> Detected:
    """Returns the format of calls. Raises ValueError for a setting that is neither a format's name nor a file
    of one.

    template: the model's chat template; None = it has none.
    setting: "auto", "none", the name of a format or the path of its file.
    declared: format that the checkpoint itself declares.
    """
    if setting == NONE:
        return Detected(None, "tool_format is 'none'")
    if setting != AUTO:
        return Detected(_named(setting), f"tool_format is {setting!r}")
    if template is None:
        return Detected(None, "the model has no chat template")
    chosen = template.chosen([TOOL])
    return detect(chosen.probe, chosen.source, declared)


def declared_format(directory: Path) -> Format | None:
    """Returns the format whose calls the checkpoint's own ``response_template`` reads back; None if there is
    no such template, or no such format."""
    declared = read_config(directory).values.get("response_template")
    if not isinstance(declared, Mapping):
        return None
    try:
        return ResponseTemplate(declared).matching(FORMATS.values())
    except ValueError as error:
        log.info("the checkpoint's form of answers is not used: %s", error)
        return None


def _named(setting: str) -> Format:
    if setting in FORMATS:
        return FORMATS[setting]
    if setting.endswith(".toml"):
        return format_file(Path(setting))
    names = ", ".join((AUTO, NONE, *FORMATS))
    raise ValueError(f"tool_format must be a .toml file or one of {names}, got {setting[:100]!r}")
