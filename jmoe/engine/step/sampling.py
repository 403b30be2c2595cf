"""Next tokens from logits, inside the jitted step: greedy, temperature, top-k, top-p, seeded.

A row's draw depends on its own seed and position only, never on its batch mates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, UInt32

from jmoe.engine.request import MAX_BAD_SEQUENCES, MAX_BIASES, MAX_LOGPROBS
from jmoe.engine.step.penalties import Seats, penalize

HostOrDevice = Array | np.ndarray
ENDS = 8  # most end tokens that ``min_tokens`` can forbid in a row
BIASES = MAX_BIASES + ENDS
NO_PENALTIES = 1.0, 0.0, 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters of a batch, one row per sequence.

    temperature_B: temperature; 0 is greedy.
    top_p_B: probability that the kept tokens must reach together; 1 is off; 0 keeps the likeliest token.
    top_k_B: number of likeliest tokens that are kept; 0 is off.
    min_p_B: share of the likeliest token's probability that a kept token needs; 0 is off.
    seed_B: seed, a 32-bit word.
    position_B: position of the token to be sampled.
    bias_ids_BX: ids of the tokens with a bias; an id past the vocabulary for none.
    bias_BX: numbers added to the logits of these tokens.
    allowed_BW: bit mask: bit t % 32 of word t // 32 says whether token t may be sampled.
    last_B: token before the one to be sampled; -1 is the token sampled last for the row's seat.
    bans_BY2: pairs of ids: the second token may not follow the first; ids past the vocabulary for none.
    penalties_B3: penalties of repetition, frequency and presence; 1, 0 and 0 are off.
    is_counted_B: whether the last token is added to the counts of the row's seat.
    has_biases: whether any row of the batch has a bias or a forbidden token.
    has_penalties: whether any row of the batch has a penalty.
    has_logprobs: whether any row of the batch reports log-probabilities.
    """

    temperature_B: Float[HostOrDevice, " B"]
    top_p_B: Float[HostOrDevice, " B"]
    top_k_B: Int[HostOrDevice, " B"]
    min_p_B: Float[HostOrDevice, " B"]
    seed_B: Int[HostOrDevice, " B"]
    position_B: Int[HostOrDevice, " B"]
    bias_ids_BX: Int[HostOrDevice, "B X"]
    bias_BX: Float[HostOrDevice, "B X"]
    allowed_BW: UInt32[HostOrDevice, "B W"]
    last_B: Int[HostOrDevice, " B"]
    bans_BY2: Int[HostOrDevice, "B Y 2"]
    penalties_B3: Float[HostOrDevice, "B 3"]
    is_counted_B: Bool[HostOrDevice, " B"]
    has_biases: Bool[HostOrDevice, ""]
    has_penalties: Bool[HostOrDevice, ""]
    has_logprobs: Bool[HostOrDevice, ""]


def blank_rows(rows: int, vocab_size: int) -> SamplingRows:
    """Returns greedy rows on the host in which every token is allowed."""
    return SamplingRows(
        temperature_B=np.zeros(rows, np.float32),
        top_p_B=np.ones(rows, np.float32),
        top_k_B=np.zeros(rows, np.int32),
        min_p_B=np.zeros(rows, np.float32),
        seed_B=np.zeros(rows, np.int32),
        position_B=np.zeros(rows, np.int32),
        bias_ids_BX=np.full((rows, BIASES), vocab_size, np.int32),
        bias_BX=np.zeros((rows, BIASES), np.float32),
        allowed_BW=np.full((rows, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32),
        last_B=np.full(rows, vocab_size, np.int32),
        bans_BY2=np.full((rows, MAX_BAD_SEQUENCES, 2), vocab_size, np.int32),
        penalties_B3=np.tile(np.array(NO_PENALTIES, np.float32), (rows, 1)),
        is_counted_B=np.zeros(rows, bool),
        has_biases=np.zeros((), bool),
        has_penalties=np.zeros((), bool),
        has_logprobs=np.zeros((), bool),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """The sampled tokens of a step.

    ids_B: sampled tokens.
    logprob_B: log-probability of the token, see ``score``.
    top_ids_BA: ids of the likeliest tokens.
    top_logprobs_BA: log-probabilities of the likeliest tokens.
    finite_B: whether the logits are finite.
    num_lost: assignments of the step, over all layers, that no expert computed; unless 0, the tokens are
        wrong.
    """

    ids_B: Int[Array, " B"]
    logprob_B: Float[Array, " B"]
    top_ids_BA: Int[Array, "B A"]
    top_logprobs_BA: Float[Array, "B A"]
    finite_B: Bool[Array, " B"]
    num_lost: Int[Array, ""] | None = None


def sample(logits_BV: Float[Array, "B V"], rows: SamplingRows, seen: Seats | None = None) -> Sampled:
    """Samples one token per row. Shaping, truncating and scoring are done only if some row requests them.

    seen: tokens before; None = no row has a penalty or needs its seat's latest token.
    """
    is_shaped = jnp.asarray(rows.has_biases) | rows.has_penalties
    shaped_BV = lax.cond(is_shaped, lambda: _shape(logits_BV, rows, seen), lambda: logits_BV)
    greedy_B = _argmax(shaped_BV)
    random = jnp.any(rows.temperature_B > 0)
    ids_B = lax.cond(random, lambda: _draw(shaped_BV, rows, greedy_B), lambda: greedy_B)
    b = logits_BV.shape[0]
    a = min(MAX_LOGPROBS, logits_BV.shape[1])
    nothing = (jnp.zeros(b), jnp.zeros((b, a), jnp.int32), jnp.zeros((b, a)))
    scored = lax.cond(rows.has_logprobs, lambda: score(logits_BV, ids_B), lambda: nothing)
    chosen_B, top_ids_BA, top_BA = scored
    return Sampled(ids_B, chosen_B, top_ids_BA, top_BA, jnp.isfinite(jnp.max(logits_BV, axis=-1)))


def _shape(logits_BV: Array, rows: SamplingRows, seen: Seats | None) -> Array:
    """Returns the logits with each row's biases added, -inf at its forbidden tokens, and then its penalties:
    the order of vLLM."""
    biased_BV = lax.cond(rows.has_biases, lambda: _bias(logits_BV, rows, seen), lambda: logits_BV)
    if seen is None:
        return biased_BV
    return lax.cond(
        rows.has_penalties, lambda: penalize(biased_BV, seen, rows.penalties_B3), lambda: biased_BV
    )


def _bias(logits_BV: Array, rows: SamplingRows, seen: Seats | None) -> Array:
    last_B = jnp.asarray(rows.last_B) if seen is None else seen.known(rows.last_B)
    row_B1 = jnp.arange(logits_BV.shape[0], dtype=jnp.int32)[:, None]
    biased_BV = logits_BV.at[row_B1, rows.bias_ids_BX].add(rows.bias_BX, mode="drop")
    before_BY, banned_BY = jnp.moveaxis(jnp.asarray(rows.bans_BY2), -1, 0)
    ban_BY = jnp.where(before_BY == last_B[:, None], -jnp.inf, 0.0)
    biased_BV = biased_BV.at[row_B1, banned_BY].add(ban_BY, mode="drop")
    token_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    words_BV = jnp.asarray(rows.allowed_BW)[:, token_V // 32]
    allowed_BV = (words_BV >> (token_V % 32).astype(jnp.uint32)[None]) & 1
    return jnp.where(allowed_BV == 1, biased_BV, -jnp.inf)


def _argmax(x_BV: Array) -> Array:
    """Computes ``jnp.argmax`` as two plain reductions, eight times as fast on XLA:CPU; it returns the last id
    among NaNs."""
    v = x_BV.shape[-1]
    highest_B1 = jnp.max(x_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x_BV >= highest_B1, jnp.arange(v, dtype=jnp.int32)[None], v - 1), axis=-1)


def _draw(logits_BV: Array, rows: SamplingRows, greedy_B: Array) -> Array:
    # The likeliest token's 0 stays 0: a small temperature sends the others to -inf and none to +inf.
    below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    scaled_BV = below_BV / jnp.where(rows.temperature_B > 0, rows.temperature_B, 1.0)[:, None]
    truncates = jnp.any((rows.top_k_B > 0) | (rows.top_p_B < 1) | (rows.min_p_B > 0))
    scaled_BV = lax.cond(truncates, lambda: _truncate(scaled_BV, rows), lambda: scaled_BV)

    def gumbel(seed: HostOrDevice, position: HostOrDevice) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), scaled_BV.shape[1:])

    noise_BV = jax.vmap(gumbel)(rows.seed_B, rows.position_B)
    drawn_B = _argmax(scaled_BV + noise_BV)
    return jnp.where(rows.temperature_B > 0, drawn_B, greedy_B)


def _truncate(scaled_BV: Array, rows: SamplingRows) -> Array:
    """Keeps the tokens with at least min_p times the likeliest token's probability, of those the top_k
    likeliest, and of those the smallest set whose probability reaches top_p: the order of vLLM.

    Tokens as likely as the least likely token kept stay too.
    """
    lowest_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True) + jnp.log(jnp.asarray(rows.min_p_B))[:, None]
    scaled_BV = jnp.where(scaled_BV >= lowest_B1, scaled_BV, -jnp.inf)
    k_B = jnp.where(rows.top_k_B > 0, rows.top_k_B, scaled_BV.shape[1])
    scaled_BV = _at_least(scaled_BV, lambda kept_BV: jnp.sum(kept_BV, axis=-1, dtype=jnp.int32) >= k_B)
    share_BV = jax.nn.softmax(scaled_BV, axis=-1)

    def reaches(kept_BV: Array) -> Array:
        total_B = jnp.sum(jnp.where(kept_BV, share_BV, 0.0), axis=-1)
        # An empty set reaches a top_p of 0 (a top_p too small for float32 is 0 too), but one token must stay.
        return (total_B >= rows.top_p_B) & (total_B > 0) & (rows.top_p_B < 1)

    return _at_least(scaled_BV, reaches)


def _at_least(x_BV: Array, is_enough: Callable[[Array], Array]) -> Array:
    """Keeps each row's values at or above the highest threshold for which ``is_enough(kept_BV)`` is true; the
    others become -inf.

    ``is_enough`` must stay true as more is kept; if it is never true, all values are kept. The threshold is
    found bit by bit in 32 passes: a sort of 150,000 tokens takes a TPU's compiler 45 s, and on a CPU it runs
    ten times as long.
    """
    bits_BV = lax.bitcast_convert_type(x_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered_BV = jnp.where(bits_BV & sign != 0, ~bits_BV, bits_BV | sign)  # sorts as the floats do

    def narrow(i: Array, threshold_B: Array) -> Array:
        higher_B = threshold_B | (sign >> i.astype(jnp.uint32))
        return jnp.where(is_enough(ordered_BV >= higher_B[:, None]), higher_B, threshold_B)

    threshold_B = lax.fori_loop(0, 32, narrow, jnp.zeros(x_BV.shape[0], jnp.uint32))
    return jnp.where(ordered_BV >= threshold_B[:, None], x_BV, -jnp.inf)


def logprobs(logits_NV: Float[Array, "*N V"], ids_N: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """Returns the log-probability of each of ``ids_N``, as ``jax.nn.log_softmax`` gives it, for them
    alone."""
    highest_N1 = jnp.max(logits_NV, axis=-1, keepdims=True)
    sum_N = jnp.sum(jnp.exp(logits_NV - highest_N1), axis=-1)
    chosen_N1 = jnp.take_along_axis(logits_NV, ids_N[..., None], axis=-1)
    return (chosen_N1 - highest_N1)[..., 0] - jnp.log(sum_N)


def rank(logits_NV: Float[Array, "*N V"], ids_N: Int[Array, "*N"]) -> Int[Array, "*N"]:
    """Returns how many tokens are at least as likely as each of ``ids_N``, which itself counts: 1 for the
    likeliest."""
    chosen_N1 = jnp.take_along_axis(logits_NV, ids_N[..., None], axis=-1)
    return jnp.sum(logits_NV >= chosen_N1, axis=-1, dtype=jnp.int32)


def score(logits_NV: Float[Array, "*N V"], ids_N: Int[Array, "*N"]) -> tuple[Array, Array, Array]:
    """Returns (log-probability of ``ids_N``, the likeliest tokens' ids, their log-probabilities), float32.

    Finding the likeliest tokens takes a CPU many times as long as the rest; call ``logprobs`` without them.
    """
    logprob_NV = jax.nn.log_softmax(logits_NV, axis=-1)
    chosen_N = jnp.take_along_axis(logprob_NV, ids_N[..., None], axis=-1)[..., 0]
    top_NA, top_ids_NA = lax.top_k(logprob_NV, min(MAX_LOGPROBS, logits_NV.shape[-1]))
    return chosen_N, top_ids_NA.astype(jnp.int32), top_NA
