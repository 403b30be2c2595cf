"""Compares one shape of each further family with transformers (see ``parity.assert_parity``)."""

import dataclasses
from pathlib import Path

import pytest
from support.models.parity import Case, assert_parity

transformers = pytest.importorskip("transformers", reason="needs the parity extra")
from support.models.families import FIRST  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("case", FIRST.values(), ids=lambda c: c.name)
def test_logits_and_greedy_tokens(case: Case, seed: int, tmp_path: Path):
    case = dataclasses.replace(case, seed=10 * seed + case.seed)
    assert_parity(case, tmp_path, converted_too=seed == 0)
