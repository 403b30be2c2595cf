"""Attention over pages equals attention over the window, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.models.small import config, decoder, mesh_of, tokens

from jmoe.config.moe import MoEConfig
from jmoe.config.parts import RopeConfig
from jmoe.nn.kinds import make_state
from jmoe.nn.kv_cache import StateSizes
from jmoe.nn.norm import rms_norm
from jmoe.nn.rope import rotate, rotation
from jmoe.nn.sequences import Sequences


def test_rope_depends_on_distance_only():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 1, 8), np.float32))
    near = rotate(x, rotation(jnp.array([[3, 5]]), 8, RopeConfig()))
    far = rotate(x, rotation(jnp.array([[103, 105]]), 8, RopeConfig()))
    dot = lambda r: float(jnp.vdot(r[0, 0], r[0, 1]))  # noqa: E731
    assert dot(near) == pytest.approx(dot(far), abs=1e-4)


def test_rms_norm_is_unit_rms():
    y = rms_norm(
        jnp.asarray(np.random.default_rng(0).standard_normal((3, 16), np.float32)) * 9, jnp.ones(16), 0.0
    )
    np.testing.assert_allclose(jnp.mean(y**2, -1), 1, rtol=1e-5)


NORMS = ("none", "head", "full")
PLACES = (  # without expert ranks, tp is dp
    ((1, 8, 1), "dp"), ((1, 8, 1), "tp"), ((1, 1, 8), "dp"), ((2, 2, 2), "dp"), ((2, 2, 2), "tp"),
    ((1, 2, 4), "dp"), ((1, 2, 4), "tp"),
)  # fmt: skip


def cells() -> list:
    """Returns every place with one norm or another, and in the long tables every place with the whole norm.

    Of the norms only that over all heads needs the heads of other ranks.
    """
    return [
        pytest.param(*place, norm, marks=pytest.mark.matrix if (i + j) % len(NORMS) else ())
        for i, place in enumerate(PLACES)
        for j, norm in enumerate(NORMS)
        if norm == "full" or (i + j) % len(NORMS) == 0
    ]


@pytest.mark.parametrize(("shape", "attention", "qk_norm"), cells(), ids=str)
def test_decoder_on_a_mesh_equals_one_device(shape, attention: str, qk_norm: str):
    """8 ranks share 2 kv heads, so these are replicated. The decoder runs with and without the cache."""
    cfg = config(
        qk_norm=qk_norm, attention_bias=qk_norm == "none", sliding_window=6 if qk_norm == "full" else None
    )
    ids = tokens(cfg, 8, 16)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)).copy()
    positions[3, 9:] = -1

    def logits(mesh, paged):
        model = decoder(cfg, mesh, MoEConfig(attention=attention))
        graph, state = nnx.split(model)
        pages = table = None
        if paged:
            per_rank = 8 // model.split.sequence_ranks
            table = np.tile(
                np.arange(2 * per_rank, dtype=np.int32).reshape(per_rank, 2), (model.split.sequence_ranks, 1)
            )
            pages = make_state(cfg, model.split, model.kernels.attention, StateSizes(2 * per_rank, 8, 1))

        def forward(state, pages):
            model = nnx.merge(graph, state)
            return model.logits(model(Sequences(ids, positions, table), pages).hidden_RND)

        return np.asarray(jax.jit(forward)(state, pages))

    want = logits(mesh_of((1, 1, 1)), False)
    for paged in (False, True):
        got = logits(mesh_of(shape), paged)
        np.testing.assert_allclose(got[positions >= 0], want[positions >= 0], atol=3e-4)
