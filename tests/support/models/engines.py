"""Engines of the small model, and what they generate."""

import numpy as np
from support.models.small import config, decoder, tokens

from jmoe.config.moe import MoEConfig
from jmoe.engine.build import make_scheduler
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine
from jmoe.engine.request import Output, Request, SamplingParams
from jmoe.engine.step.inputs import Sizes
from jmoe.engine.step.runner import Runner
from jmoe.models.decoder import Decoder

CFG = config()
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def engine_of(
    model: Decoder, mesh, seats=4, pages=40, length=64, first=1, warm_up=False, **settings
) -> Engine:
    """Returns an engine that compiles only what runs, unless a test is about just that."""
    runner = Runner(model, mesh, Sizes(tuple(sorted({first, seats})), (16, 32), 8, pages, length // 8))
    if warm_up:
        runner.warm_up()
    given = EngineSettings(max_num_batched_tokens=36, max_queue=100, **settings)
    return Engine(runner, make_scheduler(runner, given, length), None, model.cfg.eos_token_ids)


def engine_on(mesh, moe=MoEConfig(), **sizes) -> Engine:
    return engine_of(decoder(CFG, mesh, moe), mesh, **sizes)


def serve(engine: Engine, prompts, params=GREEDY) -> tuple[list[Request], list[list[Output]]]:
    outputs: list[list[Output]] = [[] for _ in prompts]
    each = params if isinstance(params, list) else [params] * len(prompts)
    requests = [
        Request(str(i), list(map(int, p)), s, outputs[i].append, 0.0)
        for i, (p, s) in enumerate(zip(prompts, each, strict=True))
    ]
    engine.run(requests)
    return requests, outputs


def prompts(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [tokens(CFG, int(rng.integers(1, 45)), seed=seed + i) for i in range(count)]
