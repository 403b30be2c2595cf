"""Penalties of repeated tokens, from counts that stay on the device: one row of numbers for each seat.

The host does not know a request's last token when the request's next step starts. So a step first counts the
token that its row was sampled after, which the host or the seat gives, and then penalises. A request whose
counts are not those of the tokens before (it has just entered, or it runs a position again) gets a whole new
row from the host.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jmoe.engine.schedule.plan import Run

PROMPT = 1 << 14  # the bit that says that the prompt has the token; the bits below it count the answer's
MOST = PROMPT - 1  # counts stay there
LARGEST = float(np.finfo(np.float32).max)


class Seats(NamedTuple):
    """The tokens that the device keeps of all seats, and the seats of a step's rows.

    latest_S: token sampled last for each seat.
    counts_SV: for each seat and token, occurrences in the answer, and ``PROMPT`` if the prompt has it.
    seats_B: seat of each row; a number past the last seat for none.
    """

    latest_S: Int[Array, " S"]
    counts_SV: Int[Array, "S V"]
    seats_B: Int[Array | np.ndarray, " B"]

    def known(self, last_B: Int[Array | np.ndarray, " B"]) -> Int[Array, " B"]:
        """Returns the rows' last tokens, with the seat's latest token for -1."""
        latest_B = self.latest_S.at[self.seats_B].get(mode="fill", fill_value=0)
        return jnp.where(jnp.asarray(last_B) < 0, latest_B, last_B)


def make_counts(seats: int, vocab_size: int) -> Array:
    """Returns the counts of seats without requests."""
    return jnp.zeros((seats, vocab_size), jnp.int16)


def counts_nbytes(seats: int, vocab_size: int) -> int:
    """Returns the bytes of ``make_counts``."""
    return seats * vocab_size * np.dtype(np.int16).itemsize


def counts_of(prompt: list[int], answer: list[int], vocab_size: int) -> np.ndarray:
    """Returns a seat's row of counts, int16 ``[V]``, on the host."""
    row_V = np.minimum(np.bincount(np.asarray(answer, np.int64), minlength=vocab_size), MOST).astype(np.int16)
    row_V[prompt] |= PROMPT
    return row_V


def new_counts(run: Run, vocab_size: int) -> np.ndarray | None:
    """Returns the row of counts that the seat of the run needs before the step, or None if it needs none: the
    request has no penalties, or the seat has the counts of all tokens but the one that the step counts. It
    notes what the seat's counts hold after the step's beginning.

    The host knows all tokens of a request that enters or runs a position again.
    """
    request, end = run.request, run.start + run.count
    if not run.is_sampled or not request.params.has_penalties:
        return None
    is_next, request.state.num_counted_tokens = continues(run), end
    if is_next:
        return None
    prompt = request.prompt_token_ids
    return counts_of(prompt, request.token_ids[: end - len(prompt)], vocab_size)


def continues(run: Run) -> bool:
    """Returns whether the seat's counts hold exactly the tokens before the run's one token of the answer."""
    request = run.request
    return run.is_decode and len(request.prompt_token_ids) <= run.start == request.state.num_counted_tokens


def count_last(
    counts_SV: Int[Array, "S V"],
    seats_B: Int[Array | np.ndarray, " B"],
    last_B: Int[Array, " B"],
    is_counted_B: Bool[Array | np.ndarray, " B"],
) -> Int[Array, "S V"]:
    """Adds the last token of each row with ``is_counted_B`` to the counts of the row's seat; a count of
    ``MOST`` stays."""
    at_B = jnp.where(is_counted_B, seats_B, counts_SV.shape[0])
    now_B = counts_SV.at[at_B, last_B].get(mode="fill", fill_value=0)
    one_B = ((now_B & MOST) < MOST).astype(jnp.int16)
    return counts_SV.at[at_B, last_B].add(one_B, mode="drop")


def replace_counts(counts_SV: Array, seat: Array, row_V: Array) -> Array:
    """Returns the counts with another row for the seat; a number past the last seat changes nothing."""
    return counts_SV.at[seat].set(row_V, mode="drop")


def penalize(
    logits_BV: Float[Array, "B V"], seen: Seats, penalties_B3: Float[Array | np.ndarray, "B 3"]
) -> Float[Array, "B V"]:
    """Returns the logits after the repetition penalty for tokens of the prompt or the answer, and then the
    frequency and the presence penalty for tokens of the answer.

    penalties_B3: the three penalties of each row; 1, 0, 0 change no bit of a row.
    """
    counts_BV = seen.counts_SV.at[seen.seats_B].get(mode="fill", fill_value=0)
    number_BV = (counts_BV & MOST).astype(jnp.float32)
    repetition_B1, frequency_B1, presence_B1 = jnp.split(jnp.asarray(penalties_B3), 3, axis=1)
    scale_BV = jnp.where(counts_BV != 0, repetition_B1, 1.0)
    scaled_BV = jnp.where(logits_BV > 0, logits_BV / scale_BV, logits_BV * scale_BV)
    # Neither an extreme penalty may make a logit infinite, nor a limit a forbidden token's finite.
    scaled_BV = jnp.clip(scaled_BV, -LARGEST, LARGEST)
    logits_BV = jnp.where((counts_BV != 0) & (logits_BV > -jnp.inf), scaled_BV, logits_BV)
    return logits_BV - frequency_B1 * number_BV - jnp.where(number_BV > 0, presence_B1, 0.0)
