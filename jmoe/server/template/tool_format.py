"""The format of a model's calls, as it is set or as its template shows it."""

from pathlib import Path

from jmoe.server.dialects.detect import AUTO, NONE, Detected, detect
from jmoe.server.dialects.files import format_file
from jmoe.server.dialects.format import Format
from jmoe.server.dialects.formats import FORMATS
from jmoe.server.template.chat_template import ChatTemplate
from jmoe.server.template.probe import TOOL


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


def _named(setting: str) -> Format:
    if setting in FORMATS:
        return FORMATS[setting]
    if setting.endswith(".toml"):
        return format_file(Path(setting))
    names = ", ".join((AUTO, NONE, *FORMATS))
    raise ValueError(f"tool_format must be a .toml file or one of {names}, got {setting[:100]!r}")
