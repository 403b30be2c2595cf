"""Runs an oracle in the engine's own executor: before each step it learns what an earlier run needed."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int
from numpy import ndarray
from shared.oracle import Oracle, belady, with_future

from jmoe.engine.step.inputs import StepInput
from jmoe.engine.step.runner import Runner
from jmoe.engine.step.state import StepOutput
from jmoe.models.journey import StepSettings

# for each decode step, the experts that it needs and when each is needed next (``simulator.next_uses``)
Known = Iterator[tuple[Bool[ndarray, "L E"], Int[ndarray, "L E"]]]


def replay(runner: Runner, oracle: Oracle, future: Known) -> Runner:
    """Returns ``runner`` after a change: from now on its forecasts and victims come from ``future``."""
    step = runner._step

    def step_with_known(inputs: StepInput, settings: StepSettings) -> StepOutput:
        if inputs.phase == "decode":
            cache = runner.cache
            assert cache is not None
            table, predictor = with_future(cache.table, oracle, *map(jnp.asarray, next(future)))
            predictor = jax.tree.map(jnp.copy, predictor)  # otherwise the step would get the same array twice
            settings_of_cache = cache.settings._replace(rule=belady)
            runner.cache = replace(cache, table=table, predictor=predictor, settings=settings_of_cache)
        return step(inputs, settings)

    runner._step = step_with_known
    return runner
