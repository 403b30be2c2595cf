"""Every layer's state has the layout of its own kind of attention, per page or per seat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jmoe_kernels.paged_attention import LayerPages
from support.models.small import config, decoder

from jmoe.config.model import ModelConfig
from jmoe.engine.step.functions import jitted
from jmoe.mesh import make_mesh, split_attention
from jmoe.nn import kinds
from jmoe.nn.grouped_query import GroupedQueryAttention
from jmoe.nn.kinds import make_state, page_bytes
from jmoe.nn.kv_cache import StateSizes, zeros

SIZES = StateSizes(num_pages=6, page_size=8, num_seats=3)


class BySeat(GroupedQueryAttention):
    """A kind whose state is one row of a request, as a recurrent kind's is."""

    state_axis = "seat"

    @classmethod
    def state_layout(cls, cfg, split, kernel, sizes) -> LayerPages:
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shape = split.sequence_ranks * sizes.num_seats, cfg.hidden_size
        return LayerPages((jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where),))  # pyright: ignore


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A model of two layers; the second one's state is by seat."""
    named = {0: "grouped_query", 1: "seat"}
    monkeypatch.setattr(ModelConfig, "attention_kind", lambda self, layer: named[layer])
    monkeypatch.setattr(kinds, "KINDS", {**kinds.KINDS, "seat": BySeat})
    return config(num_hidden_layers=2)


def test_each_layer_has_the_state_of_its_kind(mixed: ModelConfig):
    mesh = make_mesh()
    by_page, by_seat = make_state(mixed, split_attention(mesh, "dp"), "cpu", SIZES)
    assert {a.shape[0] for a in by_page.kv} == {SIZES.num_pages}
    assert [a.shape for a in by_seat.kv] == [(SIZES.num_seats, mixed.hidden_size)]


def test_only_layers_by_page_count_as_pages(mixed: ModelConfig, monkeypatch: pytest.MonkeyPatch):
    split = split_attention(make_mesh(), "dp")
    one = page_bytes(mixed, split, 8)
    monkeypatch.setattr(ModelConfig, "attention_kind", lambda self, layer: "grouped_query")
    assert page_bytes(mixed, split, 8) == 2 * one > 0


def test_a_copy_of_a_page_leaves_the_seats_alone(mixed: ModelConfig):
    model = decoder(mixed, make_mesh())
    graph, state = nnx.split(model)
    weights, structure = jax.tree.flatten(state)
    layout = kinds.state_layout(mixed, model.split, model.kernels.attention, SIZES)

    def numbered(like: jax.ShapeDtypeStruct) -> jax.Array:
        rows = jnp.arange(like.shape[0], dtype=jnp.float32).reshape(-1, *[1] * (len(like.shape) - 1))
        return zeros(like) + rows.astype(like.dtype)

    before = jax.tree.map(numbered, layout)
    seats = np.asarray(before[1].kv[0])
    by_page, by_seat = jitted(graph, structure).copy_pages(weights, before, np.int32([2]), np.int32([4]))
    for pages in by_page.kv:
        assert np.asarray(pages[:, 0, 0, 0]).tolist() == [0, 1, 2, 3, 2, 5]
    np.testing.assert_array_equal(by_seat.kv[0], seats)
