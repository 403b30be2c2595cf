"""The table of ``gpu_check.py``: its rows, and the run that collects them."""

import time
from dataclasses import dataclass, field


@dataclass
class Row:
    """One line of the table.

    section: section that measured the row.
    case: shape or input.
    name: name of the contender.
    seconds: time of the contender.
    of_limit: share of the limit that it reaches.
    verdict: verdict on the row.
    """

    section: str
    case: str
    name: str
    seconds: float | None = None
    of_limit: float | None = None
    verdict: str = ""


@dataclass
class Check:
    """The settings of the run, the machine's measured limits, and the rows up to now.

    dry: whether the run only tries the code, with toy sizes.
    start: monotonic time of the start, in seconds.
    budget: seconds of the whole run.
    peer_share: share of the budget after which peers, but not kernels, are skipped.
    rows: rows up to now.
    copy_bandwidth: bytes per second, read and written.
    dense_rate: floating-point operations per second of a dense product.
    launch: seconds of an empty step of the timing loop.
    """

    dry: bool
    start: float
    budget: float
    peer_share: float = 1.0
    rows: list[Row] = field(default_factory=list)
    copy_bandwidth: float = 0.0
    dense_rate: float = 0.0
    launch: float = 0.0

    def late(self, share: float = 1.0) -> bool:
        return time.monotonic() > self.start + self.budget * share

    def add(self, *args, **kwargs) -> Row:
        self.rows.append(Row(*args, **kwargs))
        print(line(self.rows[-1]), flush=True)
        return self.rows[-1]


def line(row: Row) -> str:
    took = "" if row.seconds is None else f"{row.seconds * 1e6:10.1f} us"
    share = "" if row.of_limit is None else f"{row.of_limit:6.1%}"
    return f"{row.section:12} {row.case:34} {row.name:22} {took:>13} {share:>7}  {row.verdict}"
