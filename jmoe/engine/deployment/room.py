"""The amount of memory of a device, before any of it is allocated.

A CPU device has the least of three sizes: the machine's available memory, the rest of its control groups'
limits, and the rest of the process's own limits (``ulimit -v``, ``-d``). Only ``device.memory_stats()`` calls
jax; all other code here runs on the host.
"""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jmoe_kernels.backends import get_backend

from jmoe.config.units import readable

CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
STARTING = 1 << 30  # bytes of address space that jax reserves while its CPU devices start
RESERVED = 256 << 20  # bytes of it that allocators and threads reserve and do not use


@dataclass(frozen=True)
class Room:
    """Memory that can still be allocated.

    bytes: number of bytes.
    source: place from which this number comes.
    """

    bytes: int
    source: str

    def __str__(self) -> str:
        return f"{readable(self.bytes)} ({self.source})"


def device_room(device: Any, sharing: int = 1) -> Room | None:
    """Returns what a device has left, or None if this is unknown.

    sharing: number of devices of this process that share one memory.
    """
    if get_backend(device.platform).has_host_memory:
        room = host_room()
        return room and Room(room.bytes // sharing, room.source)
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return Room(stats["bytes_limit"] - stats.get("bytes_in_use", 0), f"device memory of {device.device_kind}")


def host_room() -> Room | None:
    """Returns what this process may still allocate of the host's memory, or None if this is unknown."""
    return min((*_machine(), *_cgroups(), *_limits()), key=lambda room: room.bytes, default=None)


def _machine() -> Iterator[Room]:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield Room(int(line.split()[1]) * 1024, "memory available on this machine")
    except (OSError, ValueError):
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        yield Room(pages * size, "memory of this machine")


def _cgroups() -> Iterator[Room]:
    """Returns what is left in each control group of this process, and in the groups above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            names, top = ("memory.max", "memory.current", "inactive_file"), CGROUPS
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            top = CGROUPS / "memory"
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (left := _left(folder, *names)) is not None:
                yield Room(left, "the control group's memory limit")


def _left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Returns the bytes left up to the limit, without cached files that the kernel may drop, or None if there
    is no limit."""
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max"
        return None
    return None if most >= UNLIMITED else max(most - used + int(stat.get(cache, 0)), 0)


def check_start() -> None:
    """Raises ValueError if the address space is too small to start jax, which would end the process."""
    for room in _limits():
        if room.source.endswith("ulimit -v") and room.bytes + RESERVED < STARTING:
            raise ValueError(
                f"{readable(room.bytes + RESERVED)} of address space is left (ulimit -v) and starting takes "
                f"{readable(STARTING)}: raise the limit"
            )


def _limits() -> Iterator[Room]:
    try:
        pages = [int(n) for n in Path("/proc/self/statm").read_text().split()]
    except (OSError, ValueError):
        return
    size = os.sysconf("SC_PAGE_SIZE")
    kinds = (
        (resource.RLIMIT_AS, pages[0], RESERVED, "address space, ulimit -v"),
        (resource.RLIMIT_DATA, pages[5], 0, "ulimit -d"),
    )
    for kind, used, kept, source in kinds:
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY:
            yield Room(max(soft - used * size - kept, 0), source)
