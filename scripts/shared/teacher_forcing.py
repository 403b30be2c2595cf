"""Decodes windows in lock step with teacher forcing, through the engine's decode step, and scores them."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from jmoe.checkpoint import load_model
from jmoe.config.moe import MoEConfig
from jmoe.engine.deployment.settings import model_directory
from jmoe.engine.engine import Engine
from jmoe.engine.step.runner import Runner
from jmoe.engine.text.codec import TextCodec
from jmoe.mesh import make_mesh
from jmoe.tools.data import read_documents, windows
from jmoe.tools.evaluate import PageRows


def read_windows(
    model: str, valid: Path, domains: Sequence[str], count: int, length: int
) -> Int[np.ndarray, "N L"]:
    """Returns ``count`` windows of ``length`` tokens of every domain.

    The first window of each document comes first, then the second of each, and so on.
    """
    directory = model_directory(model)
    codec, rows = TextCodec(directory, 1 << 31), []
    for domain in domains:
        documents = map(codec.encode, read_documents(valid / f"{domain}.txt.xz"))
        each = [[w for w in windows([d], length) if len(w) == length] for d in documents]
        inturn = [w for turn in itertools.zip_longest(*each) for w in turn if w is not None]
        if len(inturn) < count:
            raise SystemExit(f"{domain}: {len(inturn)} windows of {length} tokens, {count} are needed")
        rows += inturn[:count]
    return np.array(rows, np.int32)


def batches(domains: int, count: int, size: int, mix: str) -> Int[np.ndarray, "S B"]:
    """Returns the windows of each batch of ``size``: neighbours of one domain, or all domains in turn."""
    order_DW = np.arange(domains * count).reshape(domains, count)
    return (order_DW if mix == "single" else order_DW.T).reshape(-1, size)


# ---- one engine


class Scorer:
    """Computes log-probabilities from hidden states on one device.

    The engine's own function also ranks the likeliest tokens, which takes many times as long.
    """

    def __init__(self, model: str):
        graph, self.weights = nnx.split(load_model(model_directory(model), make_mesh(), MoEConfig()))

        def logprobs(weights: Any, hidden_BPD: Any, targets_BP: Any) -> Any:
            logits = nnx.merge(graph, weights).logits(hidden_BPD)
            target_BP = jnp.take_along_axis(logits, targets_BP[..., None], axis=-1)[..., 0]
            return target_BP - jax.nn.logsumexp(logits, axis=-1)

        self._logprobs = jax.jit(logprobs)

    def nll(self, hidden_BPD: np.ndarray, targets_BP: np.ndarray) -> Float[np.ndarray, "B P"]:
        return -np.asarray(self._logprobs(self.weights, hidden_BPD, targets_BP), np.float64)


class Meter:
    """Decodes windows in batches on ``engine``."""

    def __init__(self, engine: Engine, scorer: Scorer, windows_NL: Int[np.ndarray, "N L"]):
        self.engine, self.scorer, self.windows_NL = engine, scorer, windows_NL

    def run(
        self,
        batches_SB: Int[np.ndarray, "S B"],
        num_prefilled: int = 0,
        on_step: Callable[[], None] = lambda: None,
    ) -> Float[np.ndarray, "N P"]:
        """Returns the loss of every decoded position of every window, in nats.

        batches_SB: windows of each batch.
        num_prefilled: number of first tokens of a window that are prefilled, not decoded.
        on_step: function that is called after every decode step.
        """
        length = self.windows_NL.shape[1]
        nll_NP = np.full((len(self.windows_NL), length - 1 - num_prefilled), np.nan)
        for rows_B in batches_SB:
            tokens_BL = self.windows_NL[rows_B]
            hidden_BPD = self._decode(tokens_BL, num_prefilled, on_step)
            nll_NP[rows_B] = self.scorer.nll(hidden_BPD, tokens_BL[:, num_prefilled + 1 :])
        return nll_NP

    def _decode(self, tokens_BL: np.ndarray, num_prefilled: int, on_step: Callable[[], None]) -> np.ndarray:
        runner, (batch, length) = self.engine.runner, tokens_BL.shape
        table_BM, hidden = PageRows(self.engine, batch // runner.ranks).table, []
        if num_prefilled:
            self._step(tokens_BL[:, :num_prefilled], 0, table_BM)
        for at in range(num_prefilled, length - 1):
            hidden.append(self._step(tokens_BL[:, at : at + 1], at, table_BM))
            on_step()
        return np.concatenate(jax.device_get(hidden), axis=1)

    def _step(self, tokens_BT: np.ndarray, start: int, table_BM: np.ndarray) -> Any:
        runner, (batch, count) = self.engine.runner, tokens_BT.shape
        if count == 1:
            inputs = runner.blank("decode", batch // runner.ranks, 1)
        else:
            inputs = runner.blank("prefill", batch // runner.ranks, runner.sizes.prefill_size(count))
        inputs.main_rows.tokens_BT[:, :count] = tokens_BT
        inputs.main_rows.positions_BT[:, :count] = np.arange(start, start + count)
        inputs.main_rows.table_BM[:] = table_BM
        return runner.run(inputs).hidden_RND


def counted(runner: Runner) -> np.ndarray:
    """Returns sums over all decode steps and layers up to now, and the number of steps.

    The sums are the active experts, the active experts of plain top-k, the computed assignments and the
    remapped assignments.
    """
    runner.drain()
    c = runner.counters["decode"]
    return np.array(
        [c.active_L.sum(), c.plain_active_L.sum(), c.counts_LE.sum(), c.sums_L["remapped"].sum(), c.steps]
    )
