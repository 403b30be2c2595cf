"""The instruction sets of the C++ kernels, one test each."""

from collections.abc import Iterator

import pytest
from jmoe_kernels import cpu

LIBRARY = cpu.get_library()


@pytest.fixture(params=() if isinstance(LIBRARY, str) else LIBRARY.isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Uses an instruction set while the test runs."""
    assert isinstance(LIBRARY, cpu.Library)
    best = LIBRARY.isa
    LIBRARY.use(request.param)
    yield request.param
    LIBRARY.use(best)
