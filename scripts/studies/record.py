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
from shared.results import Plot

Results = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One measurement of a study, which one command runs.

    name: the key of the part's figures in the JSON.
    measure: the function that takes the options and the existing figures and returns the part's figures in
        their JSON form. If the part cannot be measured, it prints a line that says why and returns None.
    data: the folder of ``--data`` that the part needs, or "".
    has_gpu_form: whether ``--gpu`` measures the part on an accelerator, as ``<name>_gpu``.
    """

    name: str
    measure: Callable[[argparse.Namespace, Results], Results | None]
    data: str = ""
    has_gpu_form: bool = False


@dataclass(frozen=True)
class Study:
    """A measured technique with its JSON, its document and its plots.

    name: the name of the study's folder here, of its template there, and of its JSON and document among the
        results.
    description: the study's help text.
    parts: the measurements. The JSON has the figures of each part under its name. If there is only one part,
        its figures are the whole JSON.
    add_options: the function that adds the study's own options. An option belongs to a part if its help
        begins with the part's name, or several names, and a colon.
    tables: the modules of the study's folder whose functions the template calls.
    has_plots: whether the folder's module ``plots`` draws some of the results.
    depth: the number of JSON levels in which every value has its own line.
    """

    name: str
    description: str
    parts: tuple[Part, ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    tables: tuple[str, ...]
    has_plots: bool = True
    depth: int = 4

    @property
    def is_whole(self) -> bool:
        """Returns whether the study has only one part."""
        return len(self.parts) == 1

    def document(self, results: Results) -> str:
        """Returns the text of ``docs/results/<name>.md``. The template decides what an absent part shows."""
        modules = {name: self._module(name) for name in self.tables}
        return render(Path(__file__).parent / self.name / f"{self.name}.md", modules | results)

    def plots(self, results: Results) -> dict[str, Plot]:
        """Returns the plots of the parts that have results, by name."""
        return self._module("plots").plots(results) if self.has_plots else {}

    def _module(self, name: str) -> ModuleType:
        """Returns a module of the study's folder; it is imported here, after cores and devices are set."""
        return import_module(f"studies.{self.name}.{name}")
