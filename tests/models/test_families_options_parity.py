"""Compares the further families, with their options, with transformers (see ``parity.assert_parity``).

It is a file of its own, since a file runs in one process.
"""

import dataclasses
from pathlib import Path

import pytest
from support.models.parity import Case, assert_parity

transformers = pytest.importorskip("transformers", reason="needs the parity extra")
from support.models.families import OPTIONS  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("case", OPTIONS, ids=lambda c: c.name)
def test_logits_and_greedy_tokens(case: Case, seed: int, tmp_path: Path):
    case = dataclasses.replace(case, seed=10 * seed + case.seed)
    assert_parity(case, tmp_path, converted_too=seed == 0)
