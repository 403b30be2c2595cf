"""Routing traces of decode steps for the expert cache's simulator, and the profile that it starts warm from.

A window of text is a request: its first part the prompt, each later token a decode step with the text's own
next token (teacher forced), so that all comparators see the same steps.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jmoe_kernels.matmul import linear
from speculative_routing import collect, domains_of, pieces

from jmoe.engine.runner import Runner
from jmoe.grouping.profile import Profile
from jmoe.models.decoder import Decoder, token_flags
from jmoe.moe.routing import route
from jmoe.nn.attention import Sequences
from jmoe.nn.norm import rms_norm
from jmoe.nn.rope import rotation
from jmoe.offload.simulator import Trace


@partial(jax.jit, static_argnums=(0, 1, 4))
def _routing(graph: Any, structure: Any, weights: list[Array], tokens_BT: Array, ahead: int) -> tuple:
    """The routers' scores [L, B, T, E], their choices, what the next layers' routers say of each layer's
    input, and the input embeddings."""
    model: Decoder = __import__("flax").nnx.merge(graph, jax.tree.unflatten(structure, weights))
    b, t = tokens_BT.shape
    seqs = Sequences(tokens_BT, jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)))
    flags, cfg = token_flags(seqs), model.cfg
    by = rotation(seqs.positions_BT, cfg.head_dim, cfg.rope_theta)
    embeddings_ND = x_ND = model.embed[...][tokens_BT.reshape(-1)].astype(jnp.float32)
    scores, ids, foretold = [], [], []
    for i, layer in enumerate(model.layers):
        y_ND, _ = layer.attention(rms_norm(x_ND, layer.input_norm[...], layer.eps), by, seqs, None)
        x_ND = x_ND + y_ND
        following = [model.layers[min(i + 1 + a, len(model.layers) - 1)] for a in range(ahead)]
        routers = [(later.post_attention_norm[...], later.moe.gate_ED[...]) for later in following]
        foretold.append(layer._ask(x_ND, routers).reshape(b, t, ahead, -1))
        normed_ND = rms_norm(x_ND, layer.post_attention_norm[...], layer.eps)
        out = layer.moe(normed_ND, flags)
        x_ND = x_ND + out.y_TD
        scores.append(out.routing.scores_TE.reshape(b, t, -1))
        ids.append(out.routing.ids_TK.reshape(b, t, -1))
    return jnp.stack(scores), jnp.stack(ids), jnp.stack(foretold), embeddings_ND.reshape(b, t, -1)
