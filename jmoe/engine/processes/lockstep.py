"""Serving with several processes: process 0 schedules, and all of them run its steps in lockstep.

Every process holds the same jitted functions and its part of the weights and pages. The leader, process 0,
sends what it is about to run (the operation, its shapes, the host arrays) and runs it; a follower reads that
and runs the same. Device results are not sent: what the host reads is the same in all processes.
"""

import logging
import struct
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from enum import IntEnum
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jmoe.config.techniques import Phase
from jmoe.engine.build import BuildProgress, build
from jmoe.engine.deployment.deployment import resolve
from jmoe.engine.deployment.found import FoundModel
from jmoe.engine.deployment.settings import EngineSettings, read_model
from jmoe.engine.engine import Engine
from jmoe.engine.processes.channel import Channel, Followers
from jmoe.engine.processes.nodes import Nodes, free_port, join, listen
from jmoe.engine.processes.rendezvous import Gate, Tunnel, knock
from jmoe.engine.request import EngineDead
from jmoe.engine.step.inputs import Sizes, StepInput
from jmoe.engine.step.runner import Runner
from jmoe.engine.step.state import StepOutput
from jmoe.models.decoder import Decoder
from jmoe.moe.orders import ShuffleTables
from jmoe.offload.cache import ExpertCache

log = logging.getLogger(__name__)
HEADER = struct.Struct("<4I")  # operation, rows (or a seat), tokens per row, decode rows


class Operation(IntEnum):
    DECODE, PREFILL, COPY, COUNTS, SCORE, WINDOW, DRAIN, STOP, NOTHING = range(9)


RUNS: dict[Phase, Operation] = {"decode": Operation.DECODE, "prefill": Operation.PREFILL}
SIGN = HEADER.pack(Operation.NOTHING, 0, 0, 0)  # process 0's sign of life; a follower's is one byte


class Leader(Runner):
    """A runner that sends every operation to the followers before it starts it."""

    def __init__(
        self,
        followers: Followers,
        model: Decoder,
        mesh: Mesh,
        sizes: Sizes,
        tables: list[ShuffleTables] | None = None,
        cache: ExpertCache | None = None,
    ):
        super().__init__(model, mesh, sizes, tables, cache)
        self._followers = followers
        self._hidden_RND: Array | None = None

    @property
    def is_alive(self) -> bool:
        return self._followers.loss is None

    def run(self, inputs: StepInput) -> StepOutput:
        decoding = 0 if inputs.decode_rows is None else len(inputs.decode_rows.tokens_BT)
        self._send(RUNS[inputs.phase], (*inputs.main_rows.tokens_BT.shape, decoding), jax.tree.leaves(inputs))
        output = super().run(inputs)
        self._hidden_RND = output.hidden_RND
        return output

    def copy_pages(self, from_R: np.ndarray, to_R: np.ndarray) -> None:
        self._send(Operation.COPY, (), [from_R, to_R])
        super().copy_pages(from_R, to_R)

    def replace_counts(self, seat: int, row_V: np.ndarray) -> None:
        self._send(Operation.COUNTS, (seat,), [row_V])
        super().replace_counts(seat, row_V)

    def score(self, hidden_RND: Array, targets_RN: np.ndarray) -> tuple[Array, ...]:
        if hidden_RND is not self._hidden_RND:  # followers keep only the last run's
            raise ValueError("with several processes only the last run can be scored")
        self._send(Operation.SCORE, targets_RN.shape, [targets_RN])
        return super().score(hidden_RND, targets_RN)

    def window_logits(self, tokens_BT: np.ndarray, positions_BT: np.ndarray) -> np.ndarray:
        self._send(Operation.WINDOW, tokens_BT.shape, [tokens_BT, positions_BT])
        return super().window_logits(tokens_BT, positions_BT)

    def drain(self) -> None:
        self._send(Operation.DRAIN)
        super().drain()

    def close(self) -> None:
        """Frees weights and cache here and in the followers, which end. It may be called again."""
        self._followers.close(self._header(Operation.STOP))
        self._hidden_RND = None
        super().close()

    def _header(self, operation: Operation, rows: int = 0, tokens: int = 0, decoding: int = 0) -> bytes:
        present = np.array([*self.knobs.values()], np.float64)
        return HEADER.pack(operation, rows, tokens, decoding) + present.tobytes()

    def _send(
        self, operation: Operation, shape: tuple[int, ...] = (), arrays: Sequence[np.ndarray] = ()
    ) -> None:
        self._followers.send([self._header(operation, *shape), *(a.tobytes() for a in arrays)])


def repeat(runner: Runner, channel: Channel) -> None:
    """Runs what the leader runs until it sends stop; raises EngineDead if the leader ends without sending
    it."""
    hidden_RND = None
    while True:
        operation, rows, tokens, decoding = HEADER.unpack(channel.read(HEADER.size))
        if operation == Operation.NOTHING:
            continue
        if operation == Operation.STOP:
            return
        channel.read_into(present := np.empty(len(runner.knobs), np.float64))
        runner.knobs = dict(zip(runner.knobs, present.tolist(), strict=True))
        if operation == Operation.DRAIN:
            runner.drain()
        elif operation in RUNS.values():
            phase: Phase = "decode" if operation == Operation.DECODE else "prefill"
            inputs = runner.blank(phase, rows // runner.ranks, tokens, decoding // runner.ranks)
            for array in jax.tree.leaves(inputs):
                channel.read_into(array.reshape(-1).view(np.uint8))
            hidden_RND = runner.run(inputs).hidden_RND
        elif operation == Operation.COPY:
            channel.read_into(both := np.zeros((2, runner.ranks), np.int32))
            runner.copy_pages(*both)
        elif operation == Operation.COUNTS:
            channel.read_into(row_V := np.zeros(runner.cfg.vocab_size, np.int16))
            runner.replace_counts(rows, row_V)
        elif operation == Operation.SCORE:
            assert hidden_RND is not None
            channel.read_into(targets := np.zeros((rows, tokens), np.int32))
            runner.score(hidden_RND, targets)
        else:
            channel.read_into(both := np.zeros((2, rows, tokens), np.int32))
            runner.window_logits(*both)


def lead(nodes: Nodes, model: FoundModel, settings: EngineSettings, progress: BuildProgress) -> Engine:
    """Returns process 0's engine, warmed up, on the mesh of all processes. Closing it ends the followers.

    Raises ValueError as ``build_engine`` does, and EngineDead if a follower is gone.
    """
    facts = facts_of(nodes, model, settings)
    coordinator = free_port()
    gate = Gate(listen(nodes.host, nodes.port), nodes.nnodes, coordinator)
    followers = Followers(gate, facts, SIGN)
    try:
        join(nodes, coordinator)
        return build(resolve(model.files, settings), progress, make_runner=partial(Leader, followers))
    except Exception as error:
        followers.close()
        if followers.loss is None:
            raise
        raise EngineDead(followers.loss) from error


def follow(
    nodes: Nodes,
    model: FoundModel,
    settings: EngineSettings,
    progress: BuildProgress,
    on_ready: Callable[[Runner], None] = lambda runner: None,
) -> None:
    """Loads this process's part of ``model`` and runs what process 0 runs, until it closes its engine. Raises
    ValueError as ``build_engine`` does, and EngineDead if process 0 is gone.

    on_ready: function that is called with the runner before its first step.
    """
    facts = facts_of(nodes, model, settings)
    connection, token = knock(nodes.host, nodes.port, nodes.rank)
    with closing(Channel(connection)) as channel:
        channel.agree(facts, 0)
        channel.keep_alive(b"\0")
        join(nodes, Tunnel(nodes.host, nodes.port, nodes.rank, token).port)
        with closing(build(resolve(model.files, settings), progress, warm_up=False)) as engine:
            on_ready(engine.runner)
            log.info("process %d of %d: runs what process 0 runs; serves no HTTP", nodes.rank, nodes.nnodes)
            repeat(engine.runner, channel)
    log.info("process %d of %d: process 0 has ended", nodes.rank, nodes.nnodes)


def facts_of(nodes: Nodes, model: FoundModel, settings: EngineSettings) -> dict[str, Any]:
    """Returns what all processes must have in common: their number, settings, the model's configuration, and
    the commit of a model of the Hub. Its ValueErrors are raised before the processes connect, so that none
    waits for one that failed."""
    cfg = read_model(model.files, settings)
    return {"nnodes": nodes.nnodes, "commit": model.commit} | asdict(settings) | asdict(cfg)
