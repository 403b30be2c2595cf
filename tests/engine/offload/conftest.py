"""The model and the profile that the tests of this folder share; a module may have its own instead."""

from pathlib import Path

import pytest
from support.models.offloaded import write_model, write_profile


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def store(model: Path) -> str:
    return write_profile(model)
