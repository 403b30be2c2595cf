"""Routing traces of decode steps for the simulator of the expert cache, and the profile to start warm from.

A window of tokens is a request: its first part the prompt, each later token a decode step. On text the next
token is the text's own (teacher forced), so that all comparators see the same steps.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int
from speculative_routing import domains_of, pieces

from jmoe import LLM, SamplingParams
from jmoe.models.decoder import Decoder
from jmoe.nn.attention import Sequences
from jmoe.offload.simulator import Trace

AHEAD = 3  # layers that a predictor may ask
CHUNK = 8  # windows routed at once


class Routed(NamedTuple):
    """Of W windows of T tokens: the routers' scores and choices, what the routers of the next layers say of
    each layer's input, and the input embeddings."""

    tokens_WT: Int[np.ndarray, "W T"]
    scores_WTLE: Float[np.ndarray, "W T L E"]
    ids_WTLK: Int[np.ndarray, "W T L K"]
    ahead_WTLAE: Float[np.ndarray, "W T L A E"]
    embeddings_WTD: Float[np.ndarray, "W T D"]


def route_windows(model: Decoder, tokens_WT: Int[np.ndarray, "W T"]) -> Routed:
    """The routing of whole windows, without a cache of keys and values."""
    graph, state = nnx.split(model)
    run = jax.jit(partial(_route, graph))
    parts = [
        jax.device_get(run(state, tokens_WT[i : i + CHUNK].astype(np.int32)))
        for i in range(0, len(tokens_WT), CHUNK)
    ]
    return Routed(tokens_WT, *(np.concatenate(part) for part in zip(*parts, strict=True)))


def _route(graph: nnx.GraphDef, state: nnx.State, tokens_BT: Array) -> tuple[Array, ...]:
    model: Decoder = nnx.merge(graph, state)
    b, t = tokens_BT.shape
    seqs = Sequences(tokens_BT, jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)))
    x_ND, by = model.begin(seqs)
    embeddings_ND, layers, last = x_ND, [], len(model.layers) - 1
    for i, layer in enumerate(model.layers):
        x_ND, _ = layer.attend(x_ND, by, seqs, None)
        following = [model.layers[min(i + 1 + a, last)] for a in range(AHEAD)]
        ahead_NAE = layer.ask(x_ND, [(f.post_attention_norm[...], f.moe.gate_ED[...]) for f in following])
        normed_ND, routed = layer.decide(x_ND, seqs, None, None)
        x_ND = x_ND + layer.moe(normed_ND, _all_valid(b * t)).y_TD
        layers.append((routed.plain.scores_TE, routed.plain.ids_TK, ahead_NAE))
    stacked = [jnp.stack(each, axis=1) for each in zip(*layers, strict=True)]
    return tuple(each.reshape(b, t, *each.shape[1:]) for each in (*stacked, embeddings_ND))
