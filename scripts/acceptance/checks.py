"""Named checks for the client programs, all of which run, and the server's own counts of requests."""

import contextlib
import re
import sys
import time
import traceback
import urllib.request
from collections.abc import Iterator


class Checks:
    """``with check("name"):`` runs a check; the next one runs whatever happens in it."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[str] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            print(f"FAIL {name}")
            self.failed.append(f"{name} ({type(error).__name__})")
        else:
            print(f"ok   {name}")
            self.passed.append(name)

    def finish(self) -> int:
        """Prints one line and returns the exit code."""
        total = len(self.passed) + len(self.failed)
        print(f"{len(self.passed)} of {total} checks" + "".join(f"; {name}" for name in self.failed))
        return bool(self.failed)


def running(base: str) -> float:
    """Returns the number of requests that run or wait in the server, by its metrics."""
    with urllib.request.urlopen(f"{base}/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(r"^jmoe_num_requests_(?:running|waiting)(?:\{.*\})? (\S+)", text, re.M)
    assert len(found) == 2, "both gauges are there"
    return sum(map(float, found))


def frees(base: str, seconds: float = 10) -> bool:
    """Returns whether all requests of the server end within ``seconds``."""
    end = time.monotonic() + seconds
    while running(base) and time.monotonic() < end:
        time.sleep(0.05)
    return running(base) == 0
