"""Lowers the engine's step of a model for devices that need not be here: nothing is allocated or run.

No part of the engine calls this. ``scripts/tpu_aot_check.py`` and the tests do: they read what compilers make
of a step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jmoe.checkpoint.params import abstract_decoder, fill, shapes_of
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.engine.offload.build import abstract_cache
from jmoe.engine.step.counters import zero_totals
from jmoe.engine.step.functions import Jitted, jitted, make_knobs
from jmoe.engine.step.inputs import Sizes, blank_input
from jmoe.engine.step.state import DeviceState
from jmoe.mesh import EXPERT, sharding
from jmoe.models.decoder import Decoder, make_blueprint
from jmoe.models.journey import StepSettings
from jmoe.moe.orders import ShuffleTables
from jmoe.nn.kinds import state_layout


def lower_step(
    cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, sizes: Sizes, *, sequences: int, tokens: int
) -> jax.stages.Lowered:
    """Lowers one step.

    With ``tokens`` 1, it decodes one token of each of ``sequences`` sequences a rank. With more, it runs
    ``tokens`` prompt tokens per rank, and decodes as many sequences as may run in the same step.

    Compile it for its memory (``memory_analysis``) and its collectives (``as_text``).
    """
    model, functions, weights = _abstract_model(cfg, moe, mesh)
    whole, ranks, most = sharding(mesh), model.split.sequence_ranks, sizes.decode[-1]
    if tokens == 1:
        inputs = blank_input(cfg.vocab_size, sizes, ranks, "decode", sequences, 1)
    else:
        row = sizes.row_tokens
        inputs = blank_input(cfg.vocab_size, sizes, ranks, "prefill", tokens // row, row, most)
    totals = jax.eval_shape(lambda: zero_totals(len(cfg.moe_layers), cfg.num_experts))
    totals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), totals)
    latest_S: Any = jax.ShapeDtypeStruct((ranks * most,), jnp.int32, sharding=whole)
    counts_SV: Any = jax.ShapeDtypeStruct((ranks * most, cfg.vocab_size), jnp.int16, sharding=whole)
    cache = abstract_cache(model, mesh, seats=most)
    state = DeviceState(
        state_layout(cfg, model.split, model.kernels.attention, sizes.state),
        {inputs.phase: totals},
        latest_S,
        counts_SV,
        cache,
    )
    settings = StepSettings(
        make_knobs(moe.knobs, 0) if moe.stages else None, _abstract_tables(cfg, moe, mesh)
    )
    with jax.set_mesh(mesh):  # the TPU kernels ask for the kind of the devices
        return functions.step.lower(weights, state, inputs, settings)


def lower_copy(cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, sizes: Sizes) -> jax.stages.Lowered:
    """Lowers the copy of a page on each rank."""
    model, functions, weights = _abstract_model(cfg, moe, mesh)
    pages = state_layout(cfg, model.split, model.kernels.attention, sizes.state)
    return functions.copy_pages.lower(weights, pages, *np.zeros((2, model.split.sequence_ranks), np.int32))


def _abstract_model(cfg: ModelConfig, moe: MoEConfig, mesh: Mesh) -> tuple[Decoder, Jitted, list]:
    """Returns the model with shapes only, its jitted functions and the shapes of its weights."""
    model, specs = abstract_decoder(make_blueprint(cfg, moe, mesh))
    arrays = {path: shapes_of(spec) for path, spec in specs.items()}
    graph, state = nnx.split(fill(model, arrays))
    weights, structure = jax.tree.flatten(state)
    return model, jitted(graph, structure), weights


def _abstract_tables(cfg: ModelConfig, moe: MoEConfig, mesh: Mesh) -> list[ShuffleTables] | None:
    """Returns the shapes of the tables by which tokens are shuffled; the placement's file is not read."""
    if moe.shuffle is None or not moe.shuffle.tokens:
        return None
    ranks = mesh.shape[EXPERT]

    def table(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, ranks), jnp.uint8, sharding=sharding(mesh))

    layer = ShuffleTables(table(cfg.vocab_size), table(ranks * ranks) if moe.shuffle.history else None)  # pyright: ignore[reportArgumentType]
    return [layer] * len(cfg.moe_layers)
