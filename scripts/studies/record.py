"""The record that describes a study. ``scripts/study.py`` iterates over these records.

A record's functions import the measuring code inside themselves, because the cores and devices must be set
before jax is imported.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.document import render
from shared.layer_sizes import shape_path
from shared.results import Plot

Results = dict[str, Any]
OLMOE = shape_path("olmoe-0.9b")  # sizes of a random model


def at_least(least: int) -> Callable[[str], int]:
    """Returns the type of an option whose value is an integer of at least ``least``."""

    def read(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return read


@dataclass(frozen=True)
class Part:
    """One measurement of a study, which one command runs.

    name: the key of the part's figures in the JSON.
    measure: the function that takes the options and the existing figures and returns the part's figures in
        their JSON form. If the part cannot be measured, it prints a line that says why and returns None.
    data: the folder of ``--data`` that the part needs, or "".
    options: the study's own options that the part reads, by their names in the parsed arguments. If the study
        has only one part, all of them are the part's.
    has_gpu_form: whether ``--gpu`` measures the part on an accelerator, as ``<name>_gpu``.
    """

    name: str
    measure: Callable[[argparse.Namespace, Results], Results | None]
    data: str = ""
    options: tuple[str, ...] = ()
    has_gpu_form: bool = False


@dataclass(frozen=True)
class Study:
    """The measurements for one document, with its JSON and its plots.

    name: the name of the study's folder here, of its template there, and of its JSON and its document.
    description: the study's help text.
    parts: the measurements. The JSON has the figures of each part under its name. If there is only one part,
        its figures are the whole JSON.
    add_options: the function that adds the study's own options. The help of an option begins with the names
        of its parts and a colon, if the study has several.
    tables: the modules of the study's folder whose functions the template calls.
    has_plots: whether the folder's module ``plots`` draws some of the results.
    depth: the number of JSON levels in which every value has its own line.
    local_options: the options that describe this machine. The stored command leaves them out.
    alias: a second name that ``study.py`` accepts: that of the paper's technique, or "".
    """

    name: str
    description: str
    parts: tuple[Part, ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    tables: tuple[str, ...]
    has_plots: bool = True
    depth: int = 4
    local_options: tuple[str, ...] = ()
    alias: str = ""

    @property
    def is_whole(self) -> bool:
        """Returns whether the study has only one part."""
        return len(self.parts) == 1

    @property
    def needs_data(self) -> bool:
        """Returns whether a part needs a folder of ``--data``."""
        return any(part.data for part in self.parts)

    def path(self, folder: Path, suffix: str) -> Path:
        """Returns the study's file of the results: ``.json`` or ``.md``."""
        return folder / f"{self.name}{suffix}"

    def document(self, results: Results) -> str:
        """Returns the text of the study's document. The template decides what an absent part shows."""
        modules = {name: self._module(name) for name in self.tables}
        text = render(Path(__file__).parent / self.name / f"{self.name}.md", modules | results)
        return text.rstrip() + "\n"  # a template may end with a part that is absent

    def plots(self, results: Results) -> dict[str, Plot]:
        """Returns the plots of the parts that have results, by name."""
        return self._module("plots").plots(results) if self.has_plots else {}

    def _module(self, name: str) -> ModuleType:
        """Returns a module of the study's folder; it is imported here, after cores and devices are set."""
        return import_module(f"studies.{self.name}.{name}")
