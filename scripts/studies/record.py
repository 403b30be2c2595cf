"""What a study is: one record, which ``scripts/study.py`` iterates over.

Its functions import what measures inside themselves: cores and devices must be set before jax is imported.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.document import render
from shared.results import Plot

Results = dict[str, Any]


def no_plots(results: Results) -> dict[str, Plot]:
    return {}


@dataclass(frozen=True)
class Part:
    """What is measured at once.

    measure: turns the options and the figures that there are into the part's own, as JSON holds them; returns
        None after a line that says why, where the part cannot be measured.
    data: the folder of ``--data`` that the part needs, or "".
    has_gpu_form: whether ``--gpu`` measures it on an accelerator, as ``<name>_gpu``.
    """

    name: str
    measure: Callable[[argparse.Namespace, Results], Results | None]
    data: str = ""
    has_gpu_form: bool = False


@dataclass(frozen=True)
class Study:
    """A measured technique with its JSON, its document and its plots.

    name: names its folder here, its template there, and its JSON and document among the results.
    description: its help.
    parts: the JSON has the figures of each under its name; those of an only part are the whole JSON.
    add_options: adds its own options. An option belongs to a part where its help begins with the part's name,
        or several names, and a colon.
    tables: returns modules, whose functions the template calls by the modules' last names.
    plots: returns the plots of the parts that have results, by name.
    depth: how many levels of the JSON have a line for each value.
    """

    name: str
    description: str
    parts: tuple[Part, ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    tables: Callable[[], Iterable[ModuleType]]
    plots: Callable[[Results], dict[str, Plot]] = no_plots
    depth: int = 4

    @property
    def is_whole(self) -> bool:
        """Returns whether the study has one part alone."""
        return len(self.parts) == 1

    def document(self, results: Results) -> str:
        """Returns the text of ``docs/results/<name>.md``; the template says what of an absent part."""
        modules = {module.__name__.rpartition(".")[2]: module for module in self.tables()}
        return render(Path(__file__).parent / self.name / f"{self.name}.md", modules | results)
