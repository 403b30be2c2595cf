"""The shapes of an expert cache, which steps are compiled for, are those of the cache that runs."""

from pathlib import Path

import jax
import numpy as np
import pytest
from support.models.small import mesh_of

from jmoe.checkpoint import load_model
from jmoe.checkpoint.quantised.codings import Quantize
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig
from jmoe.engine.offload.build import abstract_cache, make_cache


@pytest.mark.parametrize("request_", [None, Quantize("int4"), Quantize("int8", "experts")], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1)], ids=str)
def test_shapes_and_layouts_are_the_caches(model: Path, request_: Quantize | None, shape: tuple):
    mesh, moe = mesh_of(shape), MoEConfig(offload=OffloadConfig(slots_per_layer=3))
    decoder = load_model(model, mesh, moe, quantize=request_)
    ours = abstract_cache(decoder, mesh, 4)
    theirs = make_cache(decoder, mesh, 4, None)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)  # with the codings and layouts of the pool
    for own, real in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (own.shape, own.dtype) == (np.shape(real), real.dtype)
        assert own.sharding.is_equivalent_to(real.sharding, len(own.shape))
