"""Makes routing traces of decode steps for the simulator of the expert cache.

A window of tokens is a request: its first part is the prompt, and each later token is a decode step. On text,
the next token is the text's own (teacher forcing), so that all comparators see the same steps.
"""

import gzip
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int
from shared.text_routing import beginning, domains_of, pieces
from studies.offload.simulator import Trace

from jmoe import LLM, SamplingParams
from jmoe.models.decoder import Decoder
from jmoe.models.layer import router_ahead, token_flags
from jmoe.nn.sequences import Sequences

AHEAD = 3  # layers that a predictor may look ahead
CHUNK = 8  # windows that are routed at once


class RoutedWindows(NamedTuple):
    """The routing of W windows of T tokens.

    tokens_WT: tokens.
    scores_WTLE: routers' scores.
    ids_WTLK: experts that the routers chose.
    next_scores_WTLAE: scores that the routers of the next layers give to each layer's input.
    embeddings_WTD: input embeddings.
    """

    tokens_WT: Int[np.ndarray, "W T"]
    scores_WTLE: Float[np.ndarray, "W T L E"]
    ids_WTLK: Int[np.ndarray, "W T L K"]
    next_scores_WTLAE: Float[np.ndarray, "W T L A E"]
    embeddings_WTD: Float[np.ndarray, "W T D"]


def route_windows(model: Decoder, tokens_WT: Int[np.ndarray, "W T"]) -> RoutedWindows:
    """Returns the routing of whole windows. No cache of keys and values is used."""
    graph, state = nnx.split(model)
    run = jax.jit(partial(_route, graph))
    parts = [
        jax.device_get(run(state, tokens_WT[i : i + CHUNK].astype(np.int32)))
        for i in range(0, len(tokens_WT), CHUNK)
    ]
    return RoutedWindows(tokens_WT, *(np.concatenate(part) for part in zip(*parts, strict=True)))


def _route(graph: nnx.GraphDef, state: nnx.State, tokens_BT: Array) -> tuple[Array, ...]:
    model: Decoder = nnx.merge(graph, state)
    b, t = tokens_BT.shape
    seqs = Sequences(tokens_BT, jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)))
    x_ND, by = model.begin(seqs)
    embeddings_ND, layers, last = x_ND, [], len(model.layers) - 1
    for i, layer in enumerate(model.layers):
        x_ND, _ = layer.attend(x_ND, by, seqs, None)
        following = [model.layers[min(i + 1 + a, last)] for a in range(AHEAD)]
        ahead_NAE = layer.score_ahead(x_ND, [router_ahead(f) for f in following])
        assert layer.moe is not None
        out = layer.moe(layer.normed(x_ND), token_flags(seqs))
        x_ND = x_ND + out.y_TD
        layers.append((out.routing.scores_TE, out.routing.ids_TK, ahead_NAE))
    stacked = [jnp.stack(each, axis=1) for each in zip(*layers, strict=True)]
    return tuple(each.reshape(b, t, *each.shape[1:]) for each in (*stacked, embeddings_ND))


def make_traces(windows: RoutedWindows, prompt: int, batch: int) -> list[Trace]:
    """Returns a trace of each group of ``batch`` windows that run together. Windows after the last full group
    are left out."""
    w, _, _, experts = windows.scores_WTLE.shape
    traces = []
    for start in range(0, w - w % batch, batch):
        rows = slice(start, start + batch)
        ids_BPLK = windows.ids_WTLK[rows, :prompt]
        counts_BLE = (ids_BPLK[..., None] == np.arange(experts)).sum((1, 3)).astype(np.float32)

        def steps(values_WT: np.ndarray, rows: slice = rows) -> np.ndarray:
            """Returns [N, L, B, ...] for the tokens after the prompts, or [N, B, ...] without layers."""
            return np.moveaxis(values_WT[rows, prompt:], 0, 2 if values_WT.ndim > 3 else 1)

        traces.append(
            Trace(
                steps(windows.tokens_WT), steps(windows.embeddings_WTD), steps(windows.scores_WTLE),
                steps(windows.ids_WTLK), steps(windows.next_scores_WTLAE), counts_BLE,
            )
        )  # fmt: skip
    return traces


def valid_windows(llm: LLM, valid: Path, num_per_domain: int, length: int) -> Int[np.ndarray, "W T"]:
    """Returns windows of every domain's held-out text. The domains take turns, so that neighbours differ."""
    texts = [pieces(valid / f"{domain}.txt.xz", num_per_domain) for domain in domains_of(valid)]
    windows = [beginning(llm, text, length) for turn in zip(*texts, strict=True) for text in turn]
    return np.array([window for window in windows if len(window) == length], np.int32)


def mt_bench_windows(llm: LLM, path: Path, prompt: int, new: int) -> Int[np.ndarray, "W T"]:
    """Returns MT-bench's first questions with greedy answers. Each question is cut or repeated to ``prompt``
    tokens."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        questions = [json.loads(line)["turns"][0] for line in file]
    encoded = [beginning(llm, question, prompt) for question in questions]
    prompts = [(ids * (prompt // len(ids) + 1))[:prompt] for ids in encoded]
    greedy = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    answers = llm.generate(prompts, greedy)
    return np.array(
        [p + list(a.outputs[0].token_ids) for p, a in zip(prompts, answers, strict=True)], np.int32
    )


def random_windows(vocab: int, count: int, length: int, seed: int) -> Int[np.ndarray, "W T"]:
    """Returns random token ids that follow Zipf's law, for a model that fits no text."""
    rng = np.random.default_rng(seed)
    p_V = 1 / np.arange(1, vocab + 1)
    return rng.choice(vocab, (count, length), p=p_V / p_V.sum()).astype(np.int32)
