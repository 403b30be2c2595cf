"""The MoE layer with each transport compiles for 8 absent TPUs and GPUs, with the expected collectives.

The check is on bytes, because the compilers rename: a small all-gather may become an all-reduce.
"""

import json
import os
import re
import subprocess
import sys
from math import prod

import pytest
from shared import tpu_compiler as tpu_aot
from support.aot import gpu as gpu_aot

RANKS, TOKENS, MODEL, INNER, EXPERTS, K = 8, 256, 2048, 768, 64, 8  # TOKENS a rank
pytestmark = pytest.mark.aot
LOCAL = EXPERTS // RANKS
SMALL = 1 << 18  # bytes of ids, weights, sizes and counts, far below a row buffer's
ROWS = {  # rows in the largest collectives of a transport, there and back
    "replicated": (RANKS * TOKENS, RANKS * TOKENS),
    "all_to_all": (RANKS * TOKENS * min(K, LOCAL),) * 2,
    "ragged_all_to_all": (RANKS * TOKENS * min(K, LOCAL), TOKENS * K),
}
OPS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
# The end of an asynchronous one, whose result is the collective's own; its start names its operands too.
COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%\S+ = (.*?) ({OPS})(?:-done)?\(", re.M)
SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")


def collectives(hlo: str) -> list[tuple[str, int]]:
    """Returns (operation, bytes of its largest result) of each collective in ``hlo``.

    Of a reduce-scatter the bytes are those of the operand.
    """
    found = []
    for result, op in COLLECTIVE.findall(hlo):
        sizes = []
        for dtype, dims in SHAPE.findall(result):
            bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
            sizes.append(prod(int(d) for d in dims.split(",") if d) * bits // 8)
        found.append((op, max(sizes) * (RANKS if op == "reduce-scatter" else 1)))
    return found


def compile_layer(platform: str, name: str) -> str:
    """Returns the compiled program's HLO; a process of its own compiles (see ``main``)."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec
    from support.models.small import config

    from jmoe.config.moe import MoEConfig
    from jmoe.mesh import EXPERT, make_mesh
    from jmoe.models.decoder import make_blueprint
    from jmoe.moe.layer import MoELayer
    from jmoe.moe.types import TokenFlags
    from jmoe.param import ParamMaker

    if platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4")
    else:
        target = gpu_aot.description("NVIDIA H200")
        topology = topologies.get_topology_desc("1x1x8", "cuda", target_config=target, topology="1x1x8")
    mesh = make_mesh(1, RANKS, 1, topology.devices)
    cfg = config(
        hidden_size=MODEL, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=K,
        dtype="bfloat16",
    )  # fmt: skip
    moe = MoEConfig(transport=name, kernel="xla")
    blueprint = make_blueprint(cfg, moe, mesh)

    def make() -> MoELayer:
        return MoELayer(blueprint, ParamMaker(jnp.bfloat16, nnx.Rngs(0), platform=platform))

    graph, state = nnx.split(nnx.eval_shape(make))

    def abstract(param: nnx.Param) -> nnx.Param:
        shape, spec = param.get_value(), PartitionSpec(*param.get_metadata("axes"))
        sharded = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))
        return param.replace(sharded)

    state = jax.tree.map(abstract, state, is_leaf=lambda x: isinstance(x, nnx.Param))
    split = NamedSharding(mesh, PartitionSpec(EXPERT))
    x = jax.ShapeDtypeStruct((RANKS * TOKENS, MODEL), jnp.float32, sharding=split)
    valid = jax.ShapeDtypeStruct((RANKS * TOKENS,), jnp.bool_, sharding=split)

    @jax.jit
    def run(state, x, valid):
        out = nnx.merge(graph, state)(x, TokenFlags(valid))
        return out.y_TD, out.stats

    return run.lower(state, x, valid).compile().as_text()


def main(platform: str) -> None:
    found = {name: collectives(compile_layer(platform, name)) for name in ROWS}
    print(json.dumps(found))


def compiled(platform: str, environment: dict[str, str]) -> dict[str, list[tuple[str, int]]]:
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, __file__, platform], capture_output=True, text=True, timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compiling for {platform} ended with {done.returncode}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["tpu", "gpu"])
def found(request, tmp_path_factory) -> dict[str, list[tuple[str, int]]]:
    missing = tpu_aot.why_not() if request.param == "tpu" else gpu_aot.missing()
    if missing is not None:
        pytest.skip(missing)
    environment = tpu_aot.environment(tmp_path_factory.mktemp("dump")) if request.param == "tpu" else {}
    environment.pop("LIBTPU_INIT_ARGS", None)  # no dump
    return compiled(request.param, environment)


@pytest.mark.parametrize("name", ROWS)
def test_rows_go_out_in_bfloat16_and_come_back_in_float32(found: dict, name: str):
    out, back = ROWS[name]
    large = sorted(size for _, size in found[name] if size > SMALL)
    assert large == sorted([out * MODEL * 2, back * MODEL * 4]), found[name]


if __name__ == "__main__":
    main(sys.argv[1])
