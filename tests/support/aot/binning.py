"""Binning kernels compiled for described TPUs and GPUs in a process of their own; see
``tpu_compiler`` and ``gpu``."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from jmoe_kernels.binning.plan import TILE
from shared import tpu_compiler
from support.aot import gpu

TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}


def compile_cases(cases: list[dict]) -> list[dict]:
    """Returns what each case compiled to, or its error. The cases are all for TPUs or all for GPUs.

    A case has device (a key of ``TOPOLOGIES`` or of ``gpu.TARGETS``), tokens of each shard, experts, k, and
    shards; the votes of several shards are summed. A result has an entry for each kernel: cycles, spills and
    vmem on a TPU; registers and spill_bytes on a GPU if this machine has ptxas. Or it has error.
    """
    with tempfile.TemporaryDirectory() as dump:
        env = dict(
            os.environ, JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3", XLA_FLAGS=f"--xla_dump_to={dump}"
        )
        if cases[0]["device"] in TOPOLOGIES:
            env |= tpu_compiler.environment(Path(dump)) | {"XLA_FLAGS": ""}
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        done = subprocess.run(
            [sys.executable, __file__, dump], input=json.dumps(cases), env=env, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"the compiling process ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _compile(case: dict) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P
    from jmoe_kernels.binning import KernelChoice, Rule, bin_experts

    device, shards = case["device"], case["shards"]
    platform = "tpu" if device in TOPOLOGIES else "gpu"
    if platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device])
    else:
        target = {"target_config": gpu.description(device), "topology": "1x1x8"}
        topology = topologies.get_topology_desc("1x1x8", "cuda", **target)
    mesh = Mesh(np.array(topology.devices[:shards]), ("expert",))
    total = (lambda votes: lax.psum(votes, "expert")) if shards > 1 else None

    def run(logits, valid, lossy):
        return bin_experts(
            logits,
            valid,
            lossy,
            Rule("affinity", case["k"], bin_width=0.5, k0=1, keep=0.5),
            KernelChoice(f"pallas_{platform}", platform),
            renormalize=True,
            total=total,
        )

    t, sharding = case["tokens"] * shards, NamedSharding(mesh, P("expert"))
    shapes = ((t, case["experts"]), jnp.float32), ((t,), jnp.bool), ((t,), jnp.bool)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    split = jax.shard_map(run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    jax.jit(split).lower(*arguments).compile()


def _cycles(loop: tpu_compiler.Loop, trips: list) -> int:
    """Returns the cycles of one iteration.

    trips: (how often it runs, trips within it) of each inner loop, in order.
    """
    pairs = list(zip(loop.inner, trips, strict=True))
    return loop.cycles + sum(n * _cycles(inner, within) - inner.cycles for inner, (n, within) in pairs)


def _tpu_kernels(case: dict, dump: Path) -> dict[str, dict]:
    lanes, rounds = max(128, case["experts"]), (case["k"], [])
    pairs = (lanes * lanes // TILE, [])
    tiles = max(1, case["tokens"] * lanes // TILE)
    if tiles > 1:
        rounds = (tiles, [rounds])
    trips = {"bin_experts": [rounds, pairs, rounds, pairs] + [(tiles, [])] * (tiles > 1)}
    if case["shards"] > 1:
        trips["bin_experts_votes"] = [rounds]
    kernels = {name: tpu_compiler.read_kernel(dump, name) for name in trips}
    return {
        name: {"cycles": _cycles(kernel.body, trips[name]), "spills": kernel.body.spills, "vmem": kernel.vmem}
        for name, kernel in kernels.items()
    }


def _gpu_kernels(dump: Path) -> dict[str, dict]:
    found = {}
    for path in dump.glob("*.ptx"):
        if (entry := re.search(r"\.entry (bin_experts\w*)", path.read_text())) is None:
            continue
        found[entry[1]] = {}
        if (ptxas := shutil.which("ptxas")) is not None:
            command = [ptxas, "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            [registers] = re.findall(r"Used (\d+) registers", log)
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
            found[entry[1]] = {"registers": int(registers), "spill_bytes": spilled}
    return found


def main() -> None:
    dump, results = Path(sys.argv[1]), []
    for case in json.load(sys.stdin):
        try:
            _compile(case)
            results.append(_tpu_kernels(case, dump) if case["device"] in TOPOLOGIES else _gpu_kernels(dump))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"[:2000]})
        shutil.rmtree(dump)
        dump.mkdir()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
