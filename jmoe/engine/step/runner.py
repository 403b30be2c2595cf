"""Runs the steps of a model; keeps its weights, the device state between steps, and counts what compiles
after warm-up, when nothing should be left to compile."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from jmoe.config.techniques import Phase
from jmoe.engine.step.counters import (
    PHASES,
    MoECounters,
    MoETotals,
    transported_bytes,
    zero_totals,
)
from jmoe.engine.step.functions import jitted, make_knobs, maker
from jmoe.engine.step.inputs import Sizes, StepInput, blank_input
from jmoe.engine.step.penalties import make_counts
from jmoe.engine.step.state import DeviceState, StepOutput
from jmoe.engine.step.windows import WindowRouting
from jmoe.mesh import sharding
from jmoe.models.decoder import Decoder
from jmoe.models.journey import StepSettings
from jmoe.moe.expert_leaves import codings_of, expert_bytes, layouts_of
from jmoe.moe.orders import ShuffleTables
from jmoe.nn.kinds import make_state
from jmoe.offload.cache import ExpertCache

DRAIN_STEPS = 4096  # device sums are fetched at least this often, so that float32 sums stay precise


class CompilationCounter:
    """Compilations inside ``watch`` after warm-up, as jax itself reports them.

    jax reports every compilation of the process; those of another model or other code are not the runner's.
    """

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.num_after_warmup = 0
        self._is_warm, self._is_open = False, True
        self._watched_thread: int | None = None  # the thread that is in ``watch``
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def start(self) -> None:
        """Starts to count."""
        self._is_warm = True

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Counts what this thread compiles inside."""
        self._watched_thread = threading.get_ident()
        try:
            yield
        finally:
            self._watched_thread = None

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if self._is_warm and event == self.EVENT and threading.get_ident() == self._watched_thread:
            self.num_after_warmup += 1

    def close(self) -> None:
        """Stops listening. It may be called again."""
        if self._is_open:
            jax.monitoring.unregister_event_duration_listener(self._on_event)
        self._is_open = False


class Runner:
    """Runs steps of ``model``. It is not thread-safe: use it from one thread at a time.

    tables: shuffle tables, one per layer; None leaves every token on its rank.
    cache: expert cache, if experts are offloaded.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        sizes: Sizes,
        tables: list[ShuffleTables] | None = None,
        cache: ExpertCache | None = None,
    ):
        graph, state = nnx.split(model)
        self.weights, structure = jax.tree.flatten(state)
        self._jitted = jitted(graph, structure)
        self.cfg, self.kernels, self.mesh, self.sizes = model.cfg, model.kernels, mesh, sizes
        self.ranks = model.split.sequence_ranks
        self.moe, self.is_lossy = model.moe, bool(model.moe.stages)
        self.knobs = model.moe.knobs  # the values may change at any time
        self.tables = None if tables is None else jax.device_put(tables, sharding(mesh))
        self._steps = self._undrained_steps = 0
        self.state = self._first_state(model, cache)
        layers, experts = len(model.cfg.moe_layers), model.cfg.num_experts
        row_bytes = transported_bytes(model.cfg, mesh)
        experts_stored = codings_of(model.expert_weights), 1, layouts_of(model.expert_weights)
        sizes_of = row_bytes, expert_bytes(model.cfg, *experts_stored)
        self.counters = {phase: MoECounters(layers, experts, *sizes_of) for phase in PHASES}
        self.compilations = CompilationCounter()

    def _first_state(self, model: Decoder, cache: ExpertCache | None) -> DeviceState:
        sizes = self.sizes.state
        pages = make_state(model.cfg, model.split, model.kernels.attention, sizes)
        latest_S = maker(sharding(self.mesh), jnp.zeros, self.ranks * sizes.num_seats, jnp.int32)()
        seats = self.ranks * sizes.num_seats
        counts_SV = maker(sharding(self.mesh), make_counts, seats, model.cfg.vocab_size)()
        return DeviceState(pages, self._zero_totals(), latest_S, counts_SV, cache)

    def _zero_totals(self) -> dict[Phase, MoETotals]:
        make = maker(sharding(self.mesh), zero_totals, len(self.cfg.moe_layers), self.cfg.num_experts)
        return {phase: make() for phase in PHASES}

    @property
    def cache(self) -> ExpertCache | None:
        """The expert cache, if experts are offloaded."""
        return self.state.cache

    @cache.setter
    def cache(self, cache: ExpertCache | None) -> None:
        self.state = replace(self.state, cache=cache)

    @property
    def is_alive(self) -> bool:
        """Whether the runner can still run anything."""
        return True

    def blank(self, phase: Phase, sequences: int, tokens: int, decode_rows: int = 0) -> StepInput:
        """Returns an input of padding, see ``blank_input``."""
        return blank_input(self.cfg.vocab_size, self.sizes, self.ranks, phase, sequences, tokens, decode_rows)

    def run(self, inputs: StepInput) -> StepOutput:
        """Starts a step. It does not wait for the step, and all results stay on the device."""
        knobs = make_knobs(self.knobs, self._steps) if self.is_lossy else None
        self._steps += 1
        with self.compilations.watch():
            output = self._step(inputs, StepSettings(knobs, self.tables))
            self._undrained_steps += 1
            if self._undrained_steps >= DRAIN_STEPS:
                self._drain()
        return output

    def _step(self, inputs: StepInput, settings: StepSettings) -> StepOutput:
        """Starts one step. Afterwards ``state`` is the state after the step."""
        state = self.state.for_phase(inputs.phase)
        state, output = self._jitted.step(self.weights, state, inputs, settings)
        self.state = self.state.with_phase(state)
        return output

    def copy_pages(self, from_R: np.ndarray, to_R: np.ndarray) -> None:
        """Copies each rank's page ``from_R`` over its page ``to_R``, before the next step; 0 and 0 mean no
        copy."""
        with self.compilations.watch():
            pages = self._jitted.copy_pages(self.weights, self.state.pages, from_R, to_R)
        self.state = replace(self.state, pages=pages)

    def replace_counts(self, seat: int, row_V: np.ndarray) -> None:
        """Replaces the counts of a seat's tokens, before the next step, see ``penalties``."""
        with self.compilations.watch():
            counts_SV = self._jitted.replace_counts(
                self.weights, self.state.counts_SV, np.array(seat, np.int32), row_V
            )
        self.state = replace(self.state, counts_SV=counts_SV)

    def score(self, hidden_RND: Array, targets_RN: np.ndarray) -> tuple[Array, ...]:
        """Returns the log-probability of each target, the likeliest ids, their log-probabilities, and the
        rank of each target; it does not wait for them."""
        with self.compilations.watch():
            return self._jitted.score(self.weights, hidden_RND, targets_RN)

    def logprobs(self, hidden_RND: Array, targets_RN: np.ndarray) -> Array:
        """Returns the log-probability of each target alone; it does not wait, and ``warm_up`` does not
        compile it."""
        return self._jitted.logprobs(self.weights, hidden_RND, targets_RN)

    def window_logits(self, tokens_BT: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
        """Returns the ``[B, T, V]`` float32 logits of windows, on the host; it compiles for every new
        shape."""
        return np.asarray(self._jitted.window_logits(self.weights, tokens_BT, positions_BT, self.cache))

    def window_routing(
        self, tokens_BT: np.ndarray, positions_BT: np.ndarray, picks_BM: np.ndarray
    ) -> WindowRouting:
        """Returns the routers' choices in windows, and their scores at ``picks_BM`` (-1 for none), on the
        host; it compiles for every new shape."""
        arrays = tokens_BT, positions_BT, picks_BM
        return jax.device_get(self._jitted.window_routing(self.weights, *arrays, self.cache))

    @property
    def model(self) -> Decoder:
        """The model with the weights that are on the device."""
        return self._jitted.merge(self.weights)

    def drain(self) -> None:
        """Adds the device's counts to ``counters`` and sets them to zero.

        ``Leader`` overrides it, so that the followers drain too. A step calls ``_drain`` instead, because all
        processes run the step, and so each of them drains by itself.
        """
        self._drain()

    def _drain(self) -> None:
        for phase, totals in self.state.totals.items():
            self.counters[phase].drain(totals)
        self.state = replace(self.state, totals=self._zero_totals())
        self._undrained_steps = 0

    def warm_up(
        self, progress: Callable[[int, int], None] = lambda done, total: None, *, scores_prompts: bool = True
    ) -> None:
        """Compiles every shape by running it on padding. Afterwards nothing compiles."""
        sizes = self.sizes
        shapes: list[tuple[Phase, int, int, int]] = [("decode", b, 1, 0) for b in sizes.decode]
        for tokens, decoding in itertools.product(sizes.prefill, sizes.mixed_decode):
            shapes.append(("prefill", tokens // sizes.row_tokens, sizes.row_tokens, decoding))
        for done, shape in enumerate(shapes):
            progress(done, len(shapes))
            inputs = self.blank(*shape)
            hidden = self._rehearse(inputs)
            if inputs.phase == "prefill" and scores_prompts:
                self.score(hidden, np.zeros(hidden.shape[:2], np.int32))
        self.copy_pages(*np.zeros((2, self.ranks), np.int32))
        self.replace_counts(self.ranks * sizes.decode[-1], np.zeros(self.cfg.vocab_size, np.int16))
        self.drain()
        jax.block_until_ready(self.state.pages)
        progress(len(shapes), len(shapes))
        self.compilations.start()

    def _rehearse(self, inputs: StepInput) -> Array:
        """Runs padding once at warm-up, so that everything that a step of this shape may need is compiled.
        Returns the hidden states."""
        return self.run(inputs).hidden_RND

    def close(self) -> None:
        """Releases the weights and the caches. Nothing can run afterwards."""
        self.weights, self.tables = [], None
        self.state = DeviceState([], {}, self.state.latest_S, make_counts(0, 0))
        self.compilations.close()
