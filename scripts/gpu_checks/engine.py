"""Runs the engine on this machine's GPU for ``gpu_check.py``: greedy tokens, and a large model's decode step.

Run alone, it prints the greedy tokens of the bundled model:

    PYTHONPATH=.:kernels:scripts python -m gpu_checks.engine
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe import LLM, ModelConfig, MoEConfig, SamplingParams
from jmoe.checkpoint.params import abstract_decoder, fill
from jmoe.engine.deployment.settings import model_directory
from jmoe.engine.step.inputs import Sizes
from jmoe.engine.step.runner import Runner
from jmoe.mesh import make_mesh
from jmoe.models.decoder import make_blueprint

ROOT = Path(__file__).parents[2]
SHAPE = ROOT / "configs/model/qwen3-30b-a3b.toml"
TOY = {"num_hidden_layers": 2, "hidden_size": 64, "num_experts": 8, "vocab_size": 256, "head_dim": 16}
TOY |= {"num_attention_heads": 4, "moe_intermediate_size": 64, "max_position_embeddings": 1024}
CONTEXT = 512  # tokens before the decoded one
PAGE = 32


def greedy_tokens(count: int) -> list[list[int]]:
    """Returns the bundled model's greedy continuations of four prompts of 1 to 40 tokens, in float32."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, 4000, n).tolist() for n in (1, 7, 19, 40)]
    with tempfile.TemporaryDirectory() as directory:  # no tokenizer: a bare machine may be unable to read it
        for name in ("config.json", "model.safetensors"):
            shutil.copy(model_directory("tiny") / name, directory)
        with LLM(directory, dtype="float32", warm_up=False, max_num_seqs=4) as llm:
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            return [out.outputs[0].token_ids for out in llm.generate(prompts, params)]


def tokens_on_cpu() -> list[list[int]]:
    """Returns the ``greedy_tokens`` of a process that has only the CPU."""
    path = os.pathsep.join(
        [*(str(ROOT / name) for name in ("", "kernels", "scripts")), os.environ.get("PYTHONPATH", "")]
    )
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=path)
    done = subprocess.run(
        [sys.executable, "-m", "gpu_checks.engine"], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the engine on the CPU ended with {done.returncode}: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def random_model(dry: bool) -> tuple[ModelConfig, nnx.Module]:
    """Makes a model of Qwen3-30B-A3B's shape with random weights, on the device, one parameter at a time."""
    cfg = ModelConfig.from_dict(tomllib.loads(SHAPE.read_text()))
    cfg = replace(cfg, **TOY) if dry else cfg  # pyright: ignore[reportArgumentType]
    model, specs = abstract_decoder(make_blueprint(cfg, MoEConfig(), make_mesh()))
    made: dict[tuple, Callable] = {}
    arrays = {}
    for i, (path, spec) in enumerate(specs.items()):
        kind = spec.shape, spec.dtype, spec.storage
        if kind not in made:
            made[kind] = jax.jit(lambda key, k=kind: (jax.random.normal(key, k[0], k[1]) * 0.02).view(k[2]))
        is_norm = path.endswith("norm")
        arrays[path] = (
            jnp.ones(spec.shape, spec.storage)
            if is_norm
            else jax.block_until_ready(made[kind](jax.random.key(i)))
        )
    return cfg, fill(model, arrays)


class DecodeBench:
    """Runs decode steps of a random model at a context of ``CONTEXT`` tokens, the largest batch first."""

    def __init__(self, batches: tuple[int, ...], dry: bool):
        self.cfg, model = random_model(dry)
        table = CONTEXT // PAGE + 2
        sizes = Sizes(tuple(sorted(batches)), (PAGE,), PAGE, max(batches) * table, table)
        self.runner = Runner(model, make_mesh(), sizes)  # pyright: ignore[reportArgumentType]

    def step_seconds(self, batch: int, steps: int) -> tuple[float, float]:
        """Returns (median seconds of a step, its mean active experts per layer)."""
        runner, rng = self.runner, np.random.default_rng(batch)
        blank = runner.blank("decode", batch, 1)
        table = np.arange(batch * runner.sizes.table_width, dtype=np.int32).reshape(batch, -1)

        def inputs_at(i: int):
            tokens = rng.integers(0, self.cfg.vocab_size, (batch, 1)).astype(np.int32)
            positions = np.full((batch, 1), CONTEXT + i, np.int32)
            own = blank.main_rows._replace(tokens_BT=tokens, positions_BT=positions, table_BM=table)
            return replace(blank, main_rows=own)

        jax.block_until_ready(runner.run(inputs_at(0)))
        runner.drain()
        counters = runner.counters["decode"]
        before_steps, before_active = counters.steps, counters.active_L.copy()
        times = []
        for i in range(steps):
            start = time.perf_counter()
            jax.block_until_ready(runner.run(inputs_at(i)))
            times.append(time.perf_counter() - start)
        runner.drain()
        active = (counters.active_L - before_active).mean() / (counters.steps - before_steps)
        return float(np.median(times)), float(active)

    def bytes_read(self, batch: int, active: float) -> float:
        """Returns the bytes that a step must read: active experts, all dense weights, keys and values."""
        cfg = self.cfg
        heads = 2 * (cfg.num_attention_heads + cfg.num_key_value_heads) * cfg.head_dim
        layer = active * 3 * cfg.moe_intermediate_size * cfg.hidden_size
        layer += heads * cfg.hidden_size + cfg.num_experts * cfg.hidden_size
        layer += 2 * cfg.num_key_value_heads * cfg.head_dim * CONTEXT * batch
        return 2 * (cfg.num_hidden_layers * layer + cfg.vocab_size * cfg.hidden_size)


if __name__ == "__main__":
    print(json.dumps(greedy_tokens(32)))
