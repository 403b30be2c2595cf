"""Runs one of the processes of ``test_nodes``: reports what it holds and, as process 0, what it generates."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jmoe.config.moe import MoEConfig
from jmoe.engine.deployment.found import find_model
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine
from jmoe.engine.processes.lockstep import follow, lead
from jmoe.engine.processes.nodes import Nodes, leave
from jmoe.engine.request import Output, Request, SamplingParams
from jmoe.engine.step.runner import Runner

SIZES: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64}
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def generated(engine: Engine) -> dict[str, Any]:
    """Returns tokens of prompts of one run and of several, log-probabilities of a prompt, and expert counts.

    The counts are those of all steps, because the kind of step in which a token is decoded depends on the
    number of ranks.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 96, length).tolist() for length in (1, 7, 50, 33, 20)]
    outputs: list[Output] = []
    scored = dataclasses.replace(GREEDY, prompt_logprobs=0)
    penalised = dataclasses.replace(GREEDY, repetition_penalty=1.5, frequency_penalty=1.0)
    given = [scored, penalised, GREEDY, penalised, GREEDY]
    requests = [
        Request(str(i), p, params, outputs.append, 0.0)
        for i, (p, params) in enumerate(zip(prompts[::-1], given, strict=True))
    ]
    engine.run(requests)
    scores = next(o.prompt_logprobs for o in outputs if o.prompt_logprobs)
    stats = engine.moe_stats()
    counts = np.sum([stats[phase]["counts"] for phase in ("prefill", "decode")], axis=0)
    return {
        "tokens": [r.token_ids for r in requests],
        "logprobs": [s.logprob for s in scores if s],
        "counts": counts.tolist(),
    }


def held(runner: Runner) -> list[tuple[int, int]]:
    """Returns the bytes of every weight: all, and those on this process's devices; replicas count once."""
    here = [{str(s.index): s.data.nbytes for s in w.addressable_shards} for w in runner.weights]
    return [(w.nbytes, sum(parts.values())) for w, parts in zip(runner.weights, here, strict=True)]


def main(rank: int, address: str, model: str, reports: Path, moe: dict[str, Any]) -> None:
    def report(**facts: Any) -> None:
        (reports / f"p{rank}.json").write_text(json.dumps(facts))

    nodes = Nodes(2, rank, address)
    roomy = MoEConfig.from_dict({"capacity": {"factor": 4.0, "phase": "both"}, **moe})  # it drops nothing
    settings = EngineSettings(expert_parallel_size=4, tensor_parallel_size=2, moe=roomy, **SIZES)
    quiet = lambda stage, done, total: None  # noqa: E731
    if rank > 0:
        follow(nodes, find_model(model), settings, quiet, lambda runner: report(held=held(runner)))
    else:
        engine = lead(nodes, find_model(model), settings, quiet)
        report(held=held(engine.runner), **generated(engine))
        engine.close()
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), json.loads(sys.argv[5]))
