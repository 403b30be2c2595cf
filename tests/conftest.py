"""Eight emulated CPU devices and strict numerics for every test, compiled cheaply and never twice.

Most of the time is compilation, and each program runs a few times. So nothing is optimised by LLVM, and XLA
makes loops of its fusions itself instead of lowering each through MLIR, which halves the time of the whole.
What compiles is kept for a run's other tests, workers and server processes, in JMOE_CACHE_DIR where it is
set, else in a folder that goes with the run. The real clients (scripts/acceptance.sh) compile as users do.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        os.environ.get("XLA_FLAGS", ""),
    )
)

os.environ["JAX_PLATFORMS"] = "cpu"  # also of the processes that tests start, whatever is installed

import hypothesis
import jax
import pytest

from jmoe.mesh import give_threads

OWN_CACHE = None if "JMOE_CACHE_DIR" in os.environ else Path(tempfile.mkdtemp(prefix="jmoe-tests-"))
if OWN_CACHE:
    os.environ["JMOE_CACHE_DIR"] = str(OWN_CACHE)
CACHE = Path(os.environ["JMOE_CACHE_DIR"]) / "jmoe"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# What is drawn is the same in every run, and neither an example nor its drawing has a time limit: a busy
# machine is no fault.
hypothesis.settings.register_profile(
    "steady", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")

# What runs in a shell's background ignores SIGINT, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # of nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure() -> None:
    give_threads()
    found = len(jax.devices())
    if found < 8:
        raise RuntimeError(f"the tests need 8 emulated CPU devices, jax has {found}")
    if OWN_CACHE:  # the C++ kernels stay: they take a quarter of a minute, whatever is tested
        kept = Path.home() / ".cache" / "jmoe" / "kernels"
        kept.mkdir(parents=True, exist_ok=True)
        CACHE.mkdir()
        (CACHE / "kernels").symlink_to(kept)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What compares with transformers needs the parity extra, which the README's command does not install."""
    if item.get_closest_marker("parity"):
        for package in ("torch", "transformers"):
            pytest.importorskip(package, reason="needs the parity extra")


def pytest_unconfigure() -> None:
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """``jmoe serve`` configures the process's logging, also where a test runs it in this one. What it left
    would write to a stream that is closed by then, and Python a traceback for each line."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    root.setLevel(level)
    for left in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(left)
    logging.captureWarnings(False)
