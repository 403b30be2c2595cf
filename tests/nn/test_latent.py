"""Tests latent attention in the served dtype; its parity with transformers is in float32."""

import jax
import numpy as np
from flax import nnx
from support.models.small import config, decoder, tokens

from jmoe.config.parts import LatentConfig
from jmoe.mesh import make_mesh
from jmoe.nn.sequences import Sequences

LATENT = LatentConfig(14, 16, 8, 6, 8)


def test_bfloat16_is_float32_rounded():
    """It runs on a CPU, whose compiler has no bfloat16 product of single heads."""
    seen = {}
    for dtype in ("float32", "bfloat16"):
        cfg = config(latent=LATENT, num_hidden_layers=1, qk_norm="none", num_key_value_heads=8, dtype=dtype)
        seqs = Sequences(tokens(cfg, 2, 6), np.tile(np.arange(6, dtype=np.int32), (2, 1)))
        graph, state = nnx.split(decoder(cfg, make_mesh()))
        run = jax.jit(lambda s, graph=graph, seqs=seqs: nnx.merge(graph, s)(seqs).hidden_RND)
        seen[dtype] = np.asarray(run(state), np.float32).ravel()
    assert np.corrcoef(*seen.values())[0, 1] > 0.99
