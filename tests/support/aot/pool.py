"""Reports what compiled steps do with the page pool, on TPUs and GPUs that this machine need not have.

See ``pool_cases``. Compilers of accelerators read their settings once and may end their process, so
``found_on`` starts one of its own.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared import tpu_compiler
from support.aot import gpu
from support.aot.pool_cases import Found, Pool, compile_pool

SLICE = "v6e:2x4"
Case = tuple[Pool, tuple[int, int, int]]  # the pool and the mesh


def found_on(platform: str, cases: list[Case]) -> list[Found]:
    """Returns one result for each case.

    Raises RuntimeError with the compiler's words if a case does not compile.
    """
    env = dict(os.environ, JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")
    if platform == "tpu":
        env |= tpu_compiler.environment(Path(os.devnull)) | {"LIBTPU_INIT_ARGS": ""}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    given = json.dumps([(asdict(pool), mesh) for pool, mesh in cases])
    done = subprocess.run(
        [sys.executable, __file__, platform], input=given, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the compiling process ended with {done.returncode}: {done.stderr[-3000:]}")
    return [Found(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def _devices(platform: str) -> list[Any]:
    from jax.experimental import topologies

    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=SLICE).devices
    kind, *_ = gpu.TARGETS
    target = {"target_config": gpu.description(kind), "topology": "1x1x8"}
    return topologies.get_topology_desc("1x1x8", "cuda", **target).devices


def main(platform: str) -> None:
    from jmoe.mesh import make_mesh

    devices = _devices(platform)
    cases = json.load(sys.stdin)
    found = [compile_pool(Pool(**pool), make_mesh(*mesh, devices=devices)) for pool, mesh in cases]
    print(json.dumps([asdict(each) for each in found]))


if __name__ == "__main__":
    main(sys.argv[1])
