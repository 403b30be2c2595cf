"""Quality under LYNX: the bundled model's loss in decode, its batches of one domain or of several.

Windows are fed a token a step in lock step (teacher forcing) through the engine's decode step, ``batch`` of
them at once; the same windows at every batch size and setting, so that any two compare in pairs. One engine a
setting. The whole context is computed under binning here, prompts too, which serving would prefill
losslessly: hence a second protocol, at one batch size, that prefills the first half of every window.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from jmoe_kernels.binning import Method

from jmoe.checkpoint import load_model
from jmoe.config import MoEConfig
from jmoe.engine.build import EngineSettings, build_engine, model_directory
from jmoe.engine.engine import Engine
from jmoe.engine.runner import Runner
from jmoe.engine.text import TextCodec
from jmoe.mesh import make_mesh
from jmoe.techniques import BinningConfig
from jmoe.tools.data import read_documents, windows
from jmoe.tools.evaluate import PageRows

MIXES = ("single", "mixed")
BATCHES = (4, 8, 16, 32, 64)
HALF_BATCH = 16  # of the protocol with a prefilled half
WIDTHS = (0.2, 0.35, 0.5, 0.7, 1.0, 1.5)
BUDGETS: dict[Method, tuple[float, ...]] = {
    "budget": (0.4, 0.5, 0.6, 0.7, 0.85),
    "popularity": (0.4, 0.5, 0.6, 0.7, 0.85),
    "random": (0.5, 0.7, 0.85),
}
K0S = (1, 2, 3)
CENTINATS = 100  # a window's loss is kept in whole hundredths of a nat


def settings() -> dict[str, BinningConfig]:
    """What is measured, by name: "affinity/0.5"."""
    found = {f"affinity/{width}": BinningConfig(bin_width=width) for width in WIDTHS}
    for method, keeps in BUDGETS.items():
        found |= {f"{method}/{keep}": BinningConfig(method=method, keep=keep) for keep in keeps}
    return found | {f"oea/{k0}": BinningConfig(method="oea", k0=k0) for k0 in K0S}


# ---- windows


def read_windows(
    model: str, valid: Path, domains: Sequence[str], count: int, length: int
) -> Int[np.ndarray, "N L"]:
    """``count`` windows of ``length`` tokens of every domain: the first of each document, then the second."""
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
    """The windows of each batch of ``size``: neighbours of one domain, or of all domains in turn."""
    order_DW = np.arange(domains * count).reshape(domains, count)
    return (order_DW if mix == "single" else order_DW.T).reshape(-1, size)


# ---- one engine


class Scorer:
    """Log-probabilities from hidden states, on one device. The engine's own also rank the likeliest tokens,
    for many times the time."""

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
    """Decodes given windows in batches on ``engine``."""

    def __init__(self, engine: Engine, scorer: Scorer, windows_NL: Int[np.ndarray, "N L"]):
        self.engine, self.scorer, self.windows_NL = engine, scorer, windows_NL

    def run(
        self,
        batches_SB: Int[np.ndarray, "S B"],
        prefilled: int = 0,
        each_step: Callable[[], None] = lambda: None,
    ) -> Float[np.ndarray, "N P"]:
        """Loss of every decoded position of every window, nats; ``prefilled`` tokens are not decoded."""
        length = self.windows_NL.shape[1]
        nll_NP = np.full((len(self.windows_NL), length - 1 - prefilled), np.nan)
        for rows_B in batches_SB:
            tokens_BL = self.windows_NL[rows_B]
            hidden_BPD = self._decode(tokens_BL, prefilled, each_step)
            nll_NP[rows_B] = self.scorer.nll(hidden_BPD, tokens_BL[:, prefilled + 1 :])
        return nll_NP

    def _decode(self, tokens_BL: np.ndarray, prefilled: int, each_step: Callable[[], None]) -> np.ndarray:
        runner, (batch, length) = self.engine.runner, tokens_BL.shape
        table_BM, hidden = PageRows(self.engine, batch // runner.ranks).table, []
        if prefilled:
            self._step(tokens_BL[:, :prefilled], 0, table_BM)
        for at in range(prefilled, length - 1):
            hidden.append(self._step(tokens_BL[:, at : at + 1], at, table_BM))
            each_step()
        return np.concatenate(jax.device_get(hidden), axis=1)

    def _step(self, tokens_BT: np.ndarray, start: int, table_BM: np.ndarray) -> Any:
        runner, (batch, count) = self.engine.runner, tokens_BT.shape
        given = runner.blank(batch // runner.ranks, 1 if count == 1 else runner.sizes.prefill_size(count))
        given.tokens_BT[:, :count] = tokens_BT
        given.positions_BT[:, :count] = np.arange(start, start + count)
        given.table_BM[:] = table_BM
        return runner.run(given)[1]


def counted(runner: Runner) -> np.ndarray:
    """Sums over decode steps and layers so far: active experts, those of plain top-k, assignments computed
    and remapped."""
    runner.drain()
    c = runner.counters["decode"]
    return np.array(
        [c.active_L.sum(), c.plain_active_L.sum(), c.counts_LE.sum(), c.remapped_L.sum(), c.steps]
    )


# ---- all settings


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How windows are batched; ``half``: the first half is prefilled, only the second decoded and scored."""

    mix: str
    batch: int
    half: bool = False

    @property
    def name(self) -> str:
        return f"{self.mix}/{self.batch}{'/half' if self.half else ''}"


def protocols() -> list[Protocol]:
    whole = [Protocol(mix, batch) for mix in MIXES for batch in BATCHES]
    return whole + [Protocol(mix, HALF_BATCH, half=True) for mix in MIXES]


class Bench:
    """Runs of one model over ``count`` windows of every domain."""

    def __init__(self, model: str, valid: Path, domains: Sequence[str], count: int, length: int):
        self.model, self.domains, self.count = model, domains, count
        self.windows_NL = read_windows(model, valid, domains, count, length)
        self.scorer = Scorer(model)
        self.settings = EngineSettings(max_num_seqs=max(BATCHES), max_model_len=length)

    def runs(self, cfg: BinningConfig | None, alone: bool) -> dict[str, Any]:
        """By protocol, (loss of each window and position, counts); by "alone" the loss of a few batches of
        one, if asked for."""
        how, found = dataclasses.replace(self.settings, moe=MoEConfig(binning=cfg)), {}
        with closing(build_engine(self.model, how, warm_up=False)) as engine:
            meter = Meter(engine, self.scorer, self.windows_NL)
            if alone:
                found["alone"] = meter.run(np.arange(len(self.domains))[:, None] * self.count)
                assert counted(engine.runner)[3] == 0, f"{cfg} remapped in a batch of one"
            for way in protocols():
                before, half = counted(engine.runner), self.windows_NL.shape[1] // 2
                batches_SB = batches(len(self.domains), self.count, way.batch, way.mix)
                nll_NP = meter.run(batches_SB, half if way.half else 0)
                active, plain, computed, remapped, steps = counted(engine.runner) - before
                each = steps * engine.runner.cfg.num_hidden_layers
                counts = {"active": round(active / each, 3), "plain": round(plain / each, 3)}
                found[way.name] = nll_NP, counts | {"remapped": round(remapped / computed, 4)}
        return found


def measure(model: str, valid: Path, domains: Sequence[str], count: int, length: int) -> dict[str, Any]:
    """The ``quality`` part of the results. ``delta`` is each window's loss over that of the lossless run of
    the same protocol, in centinats; ``late`` the same of its second half."""
    start, bench = time.perf_counter(), Bench(model, valid, domains, count, length)
    lossless = bench.runs(None, alone=True)
    runs: dict[str, Any] = {}
    for way in protocols():
        nll_NP, counts = lossless[way.name]
        runs[way.name] = {"lossless": {"nll": nll_NP.sum(1).round(2).tolist()} | counts}
    checked: set[str] = set()
    for name, cfg in settings().items():
        found = bench.runs(cfg, alone=cfg.method not in checked)
        if cfg.method not in checked:
            same = np.array_equal(found["alone"], lossless["alone"], equal_nan=True)
            assert same, f"{name} changed a batch of one"
        checked.add(cfg.method)
        for way in protocols():
            nll_NP, counts = found[way.name]
            delta_NP = CENTINATS * (nll_NP - lossless[way.name][0])
            row = {"delta": whole(delta_NP)} | counts
            if way.batch == HALF_BATCH and not way.half:
                row["late"] = whole(delta_NP[:, length // 2 :])
            runs[way.name][name] = row
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return {
        "domains": list(domains),
        "windows": count,
        "length": length,
        "runs": runs,
        "seconds": round(time.perf_counter() - start),
    }


def whole(delta_NP: np.ndarray) -> list[int]:
    """Sums over the positions, rounded."""
    return np.rint(delta_NP.sum(1)).astype(int).tolist()
