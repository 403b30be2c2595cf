"""Functions of modules that are imported when they are needed, and not before."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class LazyFunction:
    """A function whose module is imported at the first call: Pallas takes a quarter of a second.

    module: full name of the module.
    name: name of the function in it.
    """

    module: str
    name: str

    def load(self) -> Callable[..., Any]:
        """Returns the function itself."""
        return getattr(import_module(self.module), self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)
