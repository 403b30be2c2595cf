"""Tests that a follower runs each operation with the leader's present settings, without devices."""

from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest

from jmoe.engine.processes.lockstep import SIGN, Leader, Operation, repeat


class Received:
    """A channel on which everything was already received."""

    def __init__(self, data: bytes):
        self.data = BytesIO(data)

    def read(self, count: int) -> bytes:
        return self.data.read(count)

    def read_into(self, buffer) -> None:
        assert self.data.readinto(memoryview(buffer).cast("B")) == buffer.nbytes


@pytest.mark.parametrize("changes", [[{}], [{"capacity.factor": 1.5}, {"capacity.factor": 0.1}]], ids=str)
def test_every_operation_brings_the_knobs_of_the_moment(changes: list[dict[str, float]]):
    leader = SimpleNamespace(knobs={})
    sent = b""
    for leader.knobs in changes:
        sent += SIGN + Leader._header(leader, Operation.DRAIN)  # pyright: ignore[reportArgumentType]
    sent += Leader._header(leader, Operation.STOP)  # pyright: ignore[reportArgumentType]
    seen = []
    runner = SimpleNamespace(knobs=dict.fromkeys(changes[0], 9.0), drain=lambda: seen.append(runner.knobs))
    repeat(runner, Received(sent))  # pyright: ignore[reportArgumentType]
    assert seen == changes


def test_a_follower_gets_the_counts_of_a_seat():
    leader = SimpleNamespace(knobs={})
    row_V = np.arange(96, dtype=np.int16)
    header = Leader._header(leader, Operation.COUNTS, 3)  # pyright: ignore[reportArgumentType]
    sent = header + row_V.tobytes() + Leader._header(leader, Operation.STOP)  # pyright: ignore[reportArgumentType]
    seen = []
    runner = SimpleNamespace(
        knobs={}, cfg=SimpleNamespace(vocab_size=96), replace_counts=lambda *given: seen.append(given)
    )
    repeat(runner, Received(sent))  # pyright: ignore[reportArgumentType]
    [(seat, got)] = seen
    assert seat == 3 and got.tolist() == row_V.tolist()
