"""The engine's step of a model, lowered for devices that need not be here: nothing is allocated or run."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jmoe_kernels.paged_attention import Attention, LayerPages, page_shapes

from jmoe.checkpoint.params import abstract_decoder, fill
from jmoe.config import ModelConfig, MoEConfig
from jmoe.engine.runner import Sizes, blank_input, jitted
from jmoe.engine.stats import zero_totals
from jmoe.mesh import Split, sharding
from jmoe.moe.types import Knobs
from jmoe.nn.kv_cache import kv_dtype, page_spec, stored_kv_heads


def lower_step(
    cfg: ModelConfig, moe: MoEConfig, mesh: Mesh, sizes: Sizes, *, sequences: int, tokens: int
) -> jax.stages.Lowered:
    """The step over ``sequences`` a rank of ``tokens`` each: 1 is decode, more is prefill.

    Compile it for its memory (``memory_analysis``) and its collectives (``as_text``).
    """
    model, specs = abstract_decoder(cfg, moe, mesh)
    arrays = {
        path: jax.ShapeDtypeStruct(spec.shape, spec.storage, sharding=spec.sharding)
        for path, spec in specs.items()
    }
    graph, state = nnx.split(fill(model, arrays))  # pyright: ignore[reportArgumentType]
    weights, structure = jax.tree.flatten(state)
    totals = jax.eval_shape(lambda: zero_totals(cfg.num_hidden_layers, cfg.num_experts))
    given = blank_input(cfg.vocab_size, sizes, model.split.sequence_ranks, sequences, tokens)
    with jax.set_mesh(mesh):  # the TPU kernels ask for the kind of the devices
        return jitted(graph, structure).step.lower(
            weights,
            abstract_pages(cfg, model.split, model.kernels.attention, sizes),
            jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding(mesh)), totals),
            (given.tokens_BT, given.positions_BT, given.table_BM, given.last_B, given.rows),
            None
            if moe.capacity is None
            else (given.exact_B, Knobs(np.ones((), np.float32), np.zeros((), np.int32))),
        )


def abstract_pages(cfg: ModelConfig, split: Split, attention: Attention, sizes: Sizes) -> list[LayerPages]:
    """The shapes of ``jmoe.nn.kv_cache.make_pages``."""
    count, heads = sizes.pages_per_rank * split.sequence_ranks, stored_kv_heads(cfg, split)
    dtype = kv_dtype(jnp.dtype(cfg.dtype), split.mesh)
    where = NamedSharding(split.mesh, page_spec(attention, split))
    shapes = page_shapes(attention, count, heads, sizes.page_size, cfg.head_dim)
    pages = LayerPages(tuple(jax.ShapeDtypeStruct(s, dtype, sharding=where) for s in shapes))  # pyright: ignore
    return [replace(pages) for _ in range(cfg.num_hidden_layers)]
