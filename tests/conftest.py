"""Eight emulated CPU devices and strict numerics for every test, compiled without LLVM's optimisations.

Most of the time is compilation, and each program runs a few times: 30 % less in all.
"""

import os

os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure() -> None:
    found = len(jax.devices())
    if found < 8:
        raise RuntimeError(f"the tests need 8 emulated CPU devices, jax has {found}")
