"""Reads the published token-level counts of how real models route text."""

import lzma
from pathlib import Path

import numpy as np
from jaxtyping import Int

SLOTS = (0, 7, 15)  # the model's layers that were published
MODELS = {"mixtral": ("mistral", 8, 2), "olmoe": ("olmoe", 64, 8)}  # the name in the files, experts, top k


def files_by_domain(routing: Path, model: str) -> dict[str, Path]:
    """Returns the files of ``model``, a key of ``MODELS``, by the domain of their text."""
    paths = sorted(routing.glob(f"token_expert_{MODELS[model][0]}_*.csv.xz"))
    return {path.name.split(".")[0].split("_")[-1]: path for path in paths}


def read_rows(path: Path) -> Int[np.ndarray, "N 4"]:
    """Returns a file's rows of (index in ``SLOTS``, expert, token id, count)."""
    with lzma.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",", skiprows=1, dtype=np.int64)
