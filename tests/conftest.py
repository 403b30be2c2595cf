"""Gives every test eight emulated CPU devices and strict numerics, and makes compilation cheap.

Most of the time is compilation, and each program runs only a few times. So LLVM optimises nothing, and XLA
makes loops of its fusions itself and does not lower each through MLIR. This halves the total time. Compiled
programs are kept for the other tests, workers and server processes of a run, so that none compiles twice.
They are in JMOE_CACHE_DIR if it is set, otherwise in a folder that is removed after the run. The real clients
(scripts/acceptance.sh) compile in the same way as users.
"""

import gc
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

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real Hub
os.environ["JAX_PLATFORMS"] = "cpu"  # also for the processes that tests start, whatever is installed

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

# The objects of jax, of all tests and of compiled programs are millions and stay: a collection of all of them
# takes half a second. So it is done seldom, and leaves out those that were there before the first test.
gc.set_threshold(10_000, 20, 20)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


# Every run draws the same examples, and neither an example nor its drawing has a time limit, because a busy
# machine is no fault.
hypothesis.settings.register_profile(
    "steady", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")

# A process in a shell's background ignores SIGINT, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup does this
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure() -> None:
    give_threads()
    found = len(jax.devices())
    if found < 8:
        raise RuntimeError(f"the tests need 8 emulated CPU devices, jax has {found}")
    if OWN_CACHE:  # the C++ kernels stay: they take 15 seconds, whatever is tested
        kept = Path.home() / ".cache" / "jmoe" / "kernels"
        kept.mkdir(parents=True, exist_ok=True)
        CACHE.mkdir()
        (CACHE / "kernels").symlink_to(kept)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a comparison with transformers without the parity extra, which the README does not install."""
    if item.get_closest_marker("parity"):
        for package in ("torch", "transformers"):
            pytest.importorskip(package, reason="needs the parity extra")


def pytest_unconfigure() -> None:
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Restores the process's logging after each test.

    ``jmoe serve`` configures the logging of its process, also if a test runs it in this process. The handlers
    that it leaves would later write to a closed stream, and Python would print a traceback for each line.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    root.setLevel(level)
    for left in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(left)
    logging.captureWarnings(False)
