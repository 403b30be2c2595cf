"""The jitted step of a model: its host input, its shapes, and the functions that are compiled.

One function serves prefill and decode: sequences ``[B, T]`` against the paged cache, sampled at each
sequence's last token. B and T come from short lists of sizes, so that all shapes compile at warm-up.
With several ranks, rows are rank-major: rank r owns rows ``r * B/R .. (r + 1) * B/R``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jmoe_kernels.paged_attention import LayerPages

from jmoe.config import MoEConfig
from jmoe.engine.sampling import Sampled, SamplingRows, sample, score
from jmoe.engine.stats import MoETotals, add_step, zero_totals
from jmoe.mesh import is_single, sharding
from jmoe.models.decoder import Decoder
from jmoe.moe.orders import ShuffleTables
from jmoe.moe.types import Changes, Knobs, Routing
from jmoe.nn.attention import Sequences
from jmoe.nn.kv_cache import page_spec
from jmoe.offload.cache import ExpertCache

BANNED = 8  # tokens that a row may be kept from drawing (the end tokens, under min_tokens)


@dataclass(frozen=True)
class Sizes:
    """Shapes that compile. decode: sequences a rank; prefill: tokens a run (multiples of the page size)."""

    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    page_size: int
    pages_per_rank: int
    table: int  # pages a sequence may have

    def decode_size(self, sequences: int) -> int:
        """The smallest compiled batch that holds ``sequences`` a rank."""
        return next(s for s in self.decode if s >= sequences)

    def prefill_size(self, left: int) -> int:
        """The next run for ``left`` prompt tokens: the smallest size that holds them if they fill more than
        half of it, else the largest that they fill; padding never doubles the work."""
        holds = next((s for s in self.prefill if s >= left), self.prefill[-1])
        filled = [s for s in self.prefill if s <= left]
        return holds if not filled or left > holds / 2 else filled[-1]


@dataclass(frozen=True)
class StepInput:
    """Host arrays of one step: tokens and positions ``[B, T]``, page tables ``[B, M]``, last index ``[B]``,
    sampling parameters, which rows opted out of lossy techniques ``[B]``, and their seats ``[B]``."""

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    table_BM: np.ndarray
    last_B: np.ndarray
    rows: SamplingRows
    exact_B: np.ndarray
    seats_B: np.ndarray


def blank_input(vocab_size: int, sizes: Sizes, ranks: int, sequences: int, tokens: int) -> StepInput:
    """An input of ``sequences`` rows on each of ``ranks`` in which every token is padding."""
    b = ranks * sequences
    rows = SamplingRows(
        temperature_B=np.zeros(b, np.float32),
        top_p_B=np.ones(b, np.float32),
        top_k_B=np.zeros(b, np.int32),
        seed_B=np.zeros(b, np.int32),
        position_B=np.zeros(b, np.int32),
        banned_BX=np.full((b, BANNED), vocab_size, np.int32),
        logprobs=np.zeros((), bool),
    )
    return StepInput(
        np.zeros((b, tokens), np.int32),
        np.full((b, tokens), -1, np.int32),
        np.zeros((b, sizes.table), np.int32),
        np.zeros(b, np.int32),
        rows,
        np.zeros(b, bool),
        np.zeros(b, np.int32),
    )


def is_lossy(moe: MoEConfig) -> bool:
    """Whether any technique may change what plain top-k gives."""
    return moe.binning is not None or moe.capacity is not None


def make_knobs(capacity_factor: float, step: int) -> Knobs:
    return Knobs(np.array(capacity_factor, np.float32), np.array(step & 0x7FFFFFFF, np.int32))


def readable(outputs: Any, mesh: Mesh) -> Any:
    """``outputs`` whole on every device, so that the host of each can read them; for use under jit."""
    return outputs if is_single(mesh) else lax.with_sharding_constraint(outputs, sharding(mesh))


def draw(model: Decoder, hidden_BTD: Array, last_B: Array, rows: SamplingRows) -> Sampled:
    """The token behind each sequence's last one; for use under jit."""
    last_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    with jax.named_scope("sample"):
        return sample(model.logits(last_BD), rows)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WindowRouting:
    """The routing of B windows of T positions in L layers; what stands at padding, and at picks that are
    none, means nothing.

    ids_LBTK, weights_LBTK: the experts chosen and their combine weights. gates_LBE: the mean of each
    window's router scores. embeddings_BD: the mean of its input embeddings. maps_BMLE: the scores themselves
    at M picked positions.
    """

    ids_LBTK: Array
    weights_LBTK: Array
    gates_LBE: Array
    embeddings_BD: Array
    maps_BMLE: Array


def summarize(model: Decoder, seqs: Sequences, picks_BM: Array, routing: list[Routing]) -> WindowRouting:
    """What ``routing``, one a layer, says of whole windows; for use under jit."""
    b, t = seqs.tokens_BT.shape
    valid_BT1 = (seqs.positions_BT >= 0).astype(jnp.float32)[:, :, None]

    def mean(values_BTX: Array) -> Array:
        """Over each window's own tokens."""
        return jnp.sum(values_BTX * valid_BT1, 1) / jnp.maximum(jnp.sum(valid_BT1, 1), 1.0)

    def picked(scores_TE: Array) -> Array:
        return jnp.take_along_axis(scores_TE.reshape(b, t, -1), jnp.maximum(picks_BM, 0)[:, :, None], 1)

    return WindowRouting(
        jnp.stack([r.ids_TK.reshape(b, t, -1) for r in routing]),
        jnp.stack([r.weights_TK.reshape(b, t, -1) for r in routing]),
        jnp.stack([mean(r.scores_TE.reshape(b, t, -1)) for r in routing]),
        mean(model.embed[...][seqs.tokens_BT].astype(jnp.float32)),
        jnp.stack([picked(r.scores_TE) for r in routing], 2),
    )


@dataclass(frozen=True)
class ModelFunctions:
    """The jitted functions of one model, over its flat list of weights.

    The model's structure is closed over: as a static argument it would be hashed at every call (0.8 ms for
    six layers, a third of a decode step).
    """

    graph: nnx.GraphDef
    structure: Any  # a jax tree definition

    def merge(self, weights: list[Array]) -> Decoder:
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, weights))

    def step(
        self,
        weights: list[Array],
        pages: list[LayerPages],
        totals: MoETotals,
        given: tuple,
        lossy: tuple[Array, Knobs] | None,
        tables: list[ShuffleTables] | None,
        cache: ExpertCache | None,
    ) -> tuple[Sampled, Array, list[LayerPages], MoETotals, Changes | None, ExpertCache | None]:
        """lossy: which rows opted out, and the knobs; None where no lossy technique is configured.

        tables: what to shuffle tokens by, one a layer; None leaves them where they are. cache: of offloaded
        experts.
        """
        tokens_BT, positions_BT, table_BM, last_B, seats_B, rows = given
        model = self.merge(weights)
        exact_B, knobs = (None, None) if lossy is None else lossy
        seqs = Sequences(tokens_BT, positions_BT, table_BM, exact_B, None if cache is None else seats_B)
        out = model(seqs, pages, knobs, tables, cache)
        assert out.pages is not None
        sampled = draw(model, out.hidden_BTD, last_B, rows)
        # A kernel outside the compiler's view hides the pages' sharding: another one would compile again.
        kept = NamedSharding(model.mesh, page_spec(model.kernels.attention, model.split))
        pages = lax.with_sharding_constraint(out.pages, kept)
        totals = add_step(totals, out.stats)
        sampled, totals, changes_B = readable((sampled, totals, out.changes_B), model.mesh)
        return sampled, out.hidden_BTD, pages, totals, changes_B, out.cache

    def score(self, weights: list[Array], hidden_BTD: Array, targets_BT: Array) -> tuple[Array, Array, Array]:
        """Log-probabilities of ``targets_BT`` and the likeliest tokens, about 128 positions at a time.

        A few positions of every sequence together, so that each rank of a mesh has its own ones to do.
        """
        model = self.merge(weights)
        b, t, _ = hidden_BTD.shape
        chunk = max(1, 128 // b)

        def chunks(a_BT: Array) -> Array:
            padded = jnp.pad(a_BT, ((0, 0), (0, -t % chunk), *[(0, 0)] * (a_BT.ndim - 2)))
            return padded.reshape(b, -1, chunk, *a_BT.shape[2:]).swapaxes(0, 1)

        def joined(a_NBC: Array) -> Array:
            return a_NBC.swapaxes(0, 1).reshape(b, -1, *a_NBC.shape[3:])[:, :t]

        args = chunks(hidden_BTD), chunks(targets_BT)
        scored = lax.map(lambda each: score(model.logits(each[0]), each[1]), args)
        return readable(jax.tree.map(joined, scored), model.mesh)

    def window_logits(
        self, weights: list[Array], tokens_BT: Array, positions_BT: Array, cache: ExpertCache | None
    ) -> Array:
        """``[B, T, V]`` logits of whole windows, without KV pages."""
        model = self.merge(weights)
        out = model(Sequences(tokens_BT, positions_BT), cache=cache)
        return readable(model.logits(out.hidden_BTD), model.mesh)

    def window_routing(
        self,
        weights: list[Array],
        tokens_BT: Array,
        positions_BT: Array,
        picks_BM: Array,
        cache: ExpertCache | None,
    ) -> WindowRouting:
        """What the routers of all layers chose in whole windows, without KV pages.

        picks_BM: the positions whose scores are told, -1 for none: those of all would be many times the rest.
        """
        model, seqs = self.merge(weights), Sequences(tokens_BT, positions_BT)
        return readable(summarize(model, seqs, picks_BM, model(seqs, cache=cache).routing), model.mesh)


@dataclass(frozen=True)
class Jitted:
    """The functions of ``ModelFunctions``, jitted; ``merge`` as it is. Each keeps what it has compiled, by
    shapes and devices."""

    merge: Callable[[list[Array]], Decoder]
    step: jax.stages.Wrapped
    score: jax.stages.Wrapped
    window_logits: jax.stages.Wrapped
    window_routing: jax.stages.Wrapped


@lru_cache(maxsize=8)
def jitted(graph: nnx.GraphDef, structure: Any) -> Jitted:
    """The jitted functions of one structure: runners of equal models share them, and what they compiled.

    The graph, which holds the configuration and the mesh, is hashed once a runner. The bound frees the
    programs of models that are no longer run.
    """
    functions = ModelFunctions(graph, structure)
    return Jitted(
        merge=functions.merge,
        step=jax.jit(functions.step, donate_argnums=(1, 2, 6)),
        score=jax.jit(functions.score),
        window_logits=jax.jit(functions.window_logits),
        window_routing=jax.jit(functions.window_routing),
    )


@lru_cache(maxsize=8)
def totals_maker(layers: int, experts: int, where: NamedSharding) -> Callable[[], MoETotals]:
    """A compiled maker of zeros: putting arrays on a mesh of several processes would compare them first."""
    return jax.jit(partial(zero_totals, layers, experts), out_shardings=where)
