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

    measure: from the options and the figures that there are to the part's own, as JSON holds them; None,
    after a line that says why, where it cannot be measured. data: the folder of ``--data`` that it needs.
    on_gpu: ``--gpu`` measures it on an accelerator, as ``<name>_gpu``.
    """

    name: str
    measure: Callable[[argparse.Namespace, Results], Results | None]
    data: str = ""
    on_gpu: bool = False


@dataclass(frozen=True)
class Study:
    """name: of its folder here, of its template there, and of its JSON and its document among the results.

    about: its help. parts: their figures lie under their names in the JSON; those of an only part are all of
    it. add_options: its own; an option is a part's where its help begins with the part's name, or several of
    them, and a colon. tables: modules, whose functions the template calls by the modules' last names. plots:
    those of the parts that there are, by name. depth: levels of the JSON that have a line for each value.
    """

    name: str
    about: str
    parts: tuple[Part, ...]
    add_options: Callable[[argparse.ArgumentParser], None]
    tables: Callable[[], Iterable[ModuleType]]
    plots: Callable[[Results], dict[str, Plot]] = no_plots
    depth: int = 4

    @property
    def is_whole(self) -> bool:
        """Whether it has one part alone."""
        return len(self.parts) == 1

    def document(self, results: Results) -> str:
        """The text of ``docs/results/<name>.md``; a part that is not among the results says so."""
        modules = {module.__name__.rpartition(".")[2]: module for module in self.tables()}
        return render(Path(__file__).parent / self.name / f"{self.name}.md", modules | results)
