"""Keeps a process on a number of cores. No import of this module loads jax."""

import os


def pin(threads: int) -> None:
    """Keeps this process on ``threads`` cores. Call it before the imports of jax and torch."""
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise SystemExit(f"--threads {threads}: this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores[:threads])
