"""GPU kernels on a machine without a GPU: the interpreter, and compilation for a described H100 or H200."""

import collections
import contextlib
import glob
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile

TARGETS = {
    "NVIDIA H200": {"bandwidth": 4_814_400_000_000, "l2": 62_914_560, "memory": 150_121_545_728},
    "NVIDIA H100 80GB HBM3": {"bandwidth": 3_352_320_000_000, "l2": 52_428_800, "memory": 84_978_434_048},
}


@contextlib.contextmanager
def gpu_interpreter(**options):
    """Runs Mosaic GPU kernels traced inside it in the interpreter: public in jax 0.11, private in 0.10."""
    params = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    callbacks = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    try:
        with params.force_gpu_interpret_mode(params.InterpretGPUParams(**options)):
            yield callbacks
    finally:
        callbacks.reset_gpu_interpret_mode_state()


def missing() -> str | None:
    """Returns why nothing can be compiled for CUDA here, or None."""
    for name in ("jax_cuda13_plugin", "jax_cuda12_plugin"):
        if importlib.util.find_spec(name) is not None:
            return None
    return "the CUDA plugin (jax-cuda13-plugin and jax-cuda13-pjrt) is not installed"


def description(kind: str) -> str:
    """Returns the text proto by which the compiler knows a device of ``kind``."""
    spec = TARGETS[kind]
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {spec["bandwidth"]} l2_cache_size: {spec["l2"]} clock_rate_ghz: 1.98
      device_memory_size: {spec["memory"]} shared_memory_per_block_optin: 232448
      cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536
      registers_per_block_limit: 65536 }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
    runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "{kind}" """


def compile_cases(cases: list[dict]) -> list[dict]:
    """Returns what each case compiled to, or its error.

    One process compiles them, so that no test sees its settings.

    A case is a grouped MLP with device, experts, inner, model, rows, and optionally biases, activation,
    shards (devices of a shard_map), codings (fields of the ``Coding`` of gate and up, and of down) and
    activations. Or it is a step of the engine with device, config (a file of configs/model), layers, mesh,
    sequences, tokens. A result has kernels, a list of {name, registers, spill_bytes, smem_bytes, wgmma, tma}
    without the kernels that an earlier case compiled already; calls, how often each custom call stands in the
    program; and temporary, its bytes. Or it has error.
    """
    with tempfile.TemporaryDirectory() as dump:
        env = dict(os.environ, JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3")
        env |= {"MOSAIC_GPU_DUMP_TO": dump, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        done = subprocess.run(
            [sys.executable, __file__], input=json.dumps(cases), env=env, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"the compiling process ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def kernels_in(dump: str) -> list[dict]:
    """Returns one entry for each kernel that the compiler left in ``dump``, and empties ``dump``."""
    found = []
    for path in sorted(glob.glob(f"{dump}/*.ptx")):
        with open(path) as file, open(path + "as") as log, open(path[:-3] + "mlir-passes.log") as mlir:
            ptx, ptxas, passes = file.read(), log.read(), mlir.read()
        found.append(
            {
                "name": re.search(r"\.entry (\w+)", ptx).group(1),
                "registers": max(map(int, re.findall(r"Used (\d+) registers", ptxas))),
                "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", ptxas))),
                "smem_bytes": int(re.search(r"dynamic_shared_memory_size %c(\d+)_i32", passes).group(1)),
                "wgmma": sorted(set(re.findall(r"wgmma\.mma_async[.a-z0-9]*?(m64n\d+k\d+)", ptx))),
                "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
            }
        )
    for path in glob.glob(f"{dump}/*"):
        os.remove(path)
    return found


def _devices(kind: str) -> list:
    """Returns eight described devices."""
    from jax.experimental import topologies

    target = {"target_config": description(kind), "topology": "1x1x8"}
    return topologies.get_topology_desc("1x1x8", "cuda", **target).devices


def _lower_step(case: dict):
    """Returns a step of the engine, lowered."""
    import tomllib

    from jmoe.config.model import ModelConfig
    from jmoe.config.moe import MoEConfig
    from jmoe.engine.deployment.lowering import lower_step
    from jmoe.engine.step.inputs import Sizes
    from jmoe.mesh import make_mesh

    with open(case["config"], "rb") as file:
        cfg = ModelConfig.from_dict(tomllib.load(file))
    cfg = cfg.first(case["layers"])
    mesh, b, t = make_mesh(*case["mesh"], devices=_devices(case["device"])), case["sequences"], case["tokens"]
    return lower_step(cfg, MoEConfig(), mesh, Sizes((b,), (t,), 32, 128, 16), sequences=b, tokens=t)


def _lower_mlp(case: dict):
    """Returns a grouped MLP, lowered."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P
    from jmoe_kernels.grouped_mlp.pallas_gpu import grouped_mlp_pallas_gpu
    from jmoe_kernels.grouped_mlp.pallas_gpu.blocks import choose_blocks
    from jmoe_kernels.grouped_mlp.types import ExpertWeights
    from jmoe_kernels.quantised import Coding

    shards, device = case.get("shards", 1), case["device"]
    e, f, d, n = (case[k] for k in ("experts", "inner", "model", "rows"))
    mesh = Mesh(np.array(_devices(device)[:shards]), ("expert",))
    sharding = NamedSharding(mesh, P("expert"))
    codings = [Coding(**fields) for fields in case.get("codings", ())]
    blocks = choose_blocks(n // shards, e // shards, device, "codes" if codings else "bfloat16")

    def abstract(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    biases = (abstract(e, 2, f), abstract(e, d)) if case.get("biases") else ()
    shapes = (e, 2, f, d), (e, d, f)
    if codings:
        both = [
            jax.tree.map(
                lambda array: abstract(*array.shape, dtype=array.dtype),
                coding.shapes(shape, "bfloat16", "tiles"),
            )
            for coding, shape in zip(codings, shapes, strict=True)
        ]
    else:
        both = [abstract(*shape) for shape in shapes]
    weights = ExpertWeights(*both, *biases)

    def mlp(x, weights, sizes):
        return grouped_mlp_pallas_gpu(
            x,
            weights,
            sizes,
            activation=case.get("activation", "silu"),
            blocks=blocks,
            activations=case.get("activations", "auto"),
        )

    split = jax.shard_map(mlp, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    return jax.jit(split).lower(abstract(n, d), weights, abstract(e, dtype=jnp.int32))


def main() -> None:
    results = []
    for case in json.load(sys.stdin):
        try:
            compiled = (_lower_step if "config" in case else _lower_mlp)(case).compile()
            calls = collections.Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))
            temporary = compiled.memory_analysis().temp_size_in_bytes
            kernels = kernels_in(os.environ["MOSAIC_GPU_DUMP_TO"])
            results.append({"calls": calls, "temporary": temporary, "kernels": kernels})
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"[:2000], "kernels": []})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
