"""Makes a document from its Markdown template: prose is in the template, Python makes the rest.

The templates are in the language of jinja2: ``{{ tables.speed(part) }}``, ``{{ part.seconds | minutes }}``,
``{{ share | as(".1%") }}``.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from shared.results import percent


def render(template: Path, values: dict[str, Any]) -> str:
    """Returns the template with its placeholders filled. A line that holds only a ``{% %}`` leaves no line.

    Raises jinja2.UndefinedError for a name that has no value, ValueError for a value that is None or empty.
    """
    environment = Environment(
        undefined=StrictUndefined,
        finalize=present,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"as": format, "minutes": minutes, "percent": percent, "versions": versions}
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)


def present(value: Any) -> Any:
    """Returns the value of a placeholder. Raises ValueError if it is None or empty."""
    if value is None or value == "":
        raise ValueError("a placeholder of the template has no value")
    return value


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}"


def versions(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in packages.items())
