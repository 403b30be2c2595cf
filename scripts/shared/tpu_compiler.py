"""Static costs of TPU kernels, from a compiler that needs no TPU: libtpu's ahead-of-time one.

A process compiles with ``environment`` and for nothing else, because libtpu reads its options once, from the
environment, and because a failed check inside it aborts the process. ``read_kernel`` reads the compiler's
dump: the scheduled bundles (an in-order core issues one a cycle), the loops among them, and VMEM allocations.
Waiting for DMAs is not part of a schedule, so cycles are those of a kernel whose data is always there.
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s*(?:[A-Z]{2}\s*)*:")
BRANCH = re.compile(r"sbr\.rel[^;}]*bundleno = (\d+)")
SPILL = re.compile(r"\bvst\b[^;}]*\[vmem:\[#allocation\d+_spill")
VMEM = re.compile(r"^\s*(#allocation\d+) \[.*space=vmem, size = (0x[0-9a-f]+)")
DELAY_SLOTS = 5  # bundles after a branch that still run


@dataclass(frozen=True)
class Loop:
    """A loop in the schedule. Loops inside it count once in its numbers, whatever their trip count.

    cycles: cycles of one iteration.
    spills: how many of them store a spilled vector register.
    inner: loops inside it, in program order.
    """

    cycles: int
    spills: int
    inner: tuple["Loop", ...]

    def total(self, trips: list[int]) -> int:
        """Returns the cycles of one iteration in which the inner loops run ``trips`` times each."""
        if len(trips) != len(self.inner):
            raise ValueError(f"{len(self.inner)} loops in the schedule, {len(trips)} in the source")
        return self.cycles + sum(inner.cycles * (n - 1) for inner, n in zip(self.inner, trips, strict=True))


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    body: kernel as one loop body that runs once.
    vmem: bytes of its buffers and scratch.
    """

    body: Loop
    vmem: int


def why_not() -> str | None:
    """Returns why nothing can be compiled here, or None."""
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed (pip install libtpu)"


def environment(dump: Path) -> dict[str, str]:
    """Returns the environment of a process that compiles for TPUs.

    The process is quiet, tolerates others that compile at the same time, and dumps to ``dump``.
    """
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
    }


def _nest(spans: list[tuple[int, int]], spilled: list[int], start: int, end: int) -> Loop:
    """Returns the loop over bundles [start, end), with the loops of ``spans`` that lie strictly inside."""
    inside = [s for s in spans if start <= s[0] and s[1] <= end and s != (start, end)]
    outermost = [s for s in inside if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in inside)]
    inner = tuple(_nest(inside, spilled, *s) for s in sorted(outermost))
    return Loop(end - start, sum(spilled[start:end]), inner)


def parse_bundles(text: str) -> Loop:
    """Returns the schedule in a dump of bundles; a loop is a branch back to a bundle at or before its own."""
    spilled: list[int] = []
    starts: dict[int, int] = {}  # bundle that a loop starts with -> the last branch back to it
    for line in text.splitlines():
        if found := BUNDLE.match(line):
            at = int(found[1], 16)
            spilled += [0] * (at + 1 - len(spilled))
            spilled[at] = len(SPILL.findall(line))
            back = BRANCH.search(line)
            if back and int(back[1]) <= at:
                starts[int(back[1])] = at
    spans = [(start, min(at + 1 + DELAY_SLOTS, len(spilled))) for start, at in starts.items()]
    return _nest(spans, spilled, 0, len(spilled))


def read_kernel(dump: Path, name: str) -> Kernel:
    """Returns the kernel called ``name`` in ``dump``.

    Raises FileNotFoundError if the compiler has dumped none.
    """
    schedules = [p for p in dump.glob(f"*-{name}.*-packed-bundles-post-ra.txt") if "analysis" not in p.name]
    if not schedules:
        raise FileNotFoundError(f"no schedule of {name} in {dump}")
    [final] = dump.glob(f"*-{name}.*-post-delay-converter.txt")
    sizes = {m[1]: int(m[2], 16) for m in map(VMEM.match, final.read_text().splitlines()) if m}
    return Kernel(parse_bundles(schedules[0].read_text()), sum(sizes.values()))
