"""Tests the end of an engine, and two engines in one process."""

import gc
import weakref

import jax
import jax.numpy as jnp
import pytest
from support.models.hf_tiny import hf_config, write_checkpoint

from jmoe import LLM, SamplingParams
from jmoe.config.moe import MoEConfig
from jmoe.engine.build import build_engine
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.request import EngineDead, Request
from jmoe.engine.step.runner import CompilationCounter
from jmoe.engine.worker import EngineWorker

SMALL = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 32}
GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, hf_config(eos_token_id=None))
    return directory


def compile_something() -> None:
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(17))


def test_the_counter_hears_its_own_thread_inside_watch_and_after_warm_up():
    counter = CompilationCounter()
    with counter.watch():
        compile_something()
    assert counter.num_after_warmup == 0, "warm-up itself does not count"
    counter.start()
    compile_something()
    assert counter.num_after_warmup == 0, "outside watch nothing counts"
    with counter.watch():
        compile_something()
    heard = counter.num_after_warmup
    assert heard > 0
    counter.close()
    counter.close()
    with counter.watch():
        compile_something()
    assert counter.num_after_warmup == heard, "a closed counter hears nothing"


def test_a_second_llm_and_logits_are_not_compilations_of_the_first(model):
    with LLM(model, **SMALL) as first:
        first.logits([1, 2, 3])
        with LLM(model, **SMALL | {"max_num_seqs": 1, "max_model_len": 32}) as second:
            assert second.generate([[1, 2]], GREEDY)[0].outputs[0].token_ids
        first.generate([[1, 2]], GREEDY)
        assert first.engine.snapshot().compilations_after_warmup == 0


def test_a_closed_llm_has_freed_its_weights_and_refuses(model):
    with LLM(model, **SMALL) as llm:
        weight = weakref.ref(llm.engine.runner.weights[0])
        llm.generate([[1, 2]], GREEDY)
    gc.collect()  # modules refer to each other in a circle
    assert weight() is None and not llm.engine.runner.state.pages
    llm.close()
    for use in (lambda: llm.generate([[1, 2]], GREEDY), lambda: llm.logits([1, 2])):
        with pytest.raises(EngineDead, match="the engine is closed"):
            use()


def test_closing_the_worker_closes_its_engine(model):
    engine = build_engine(model, EngineSettings(**SMALL))
    worker = EngineWorker(engine)
    worker.start()
    worker.close()
    with pytest.raises(EngineDead, match="the engine is closed"):
        engine.run([Request("late", [1], GREEDY, lambda output: None, 0.0)])
    heard = engine.runner.compilations.num_after_warmup
    with engine.runner.compilations.watch():
        compile_something()
    assert engine.runner.compilations.num_after_warmup == heard


def test_without_warm_up_only_what_runs_is_compiled(model):
    """One prefill and one decode shape are compiled, of a size that no other test compiles."""
    compiled: list[str] = []

    def heard(event: str, seconds: float, **more: str | int) -> None:
        compiled.extend([event] if event == CompilationCounter.EVENT else [])

    shapes = SMALL | {"max_model_len": 120}
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        with LLM(model, **shapes, warm_up=False) as cold:
            loading = len(compiled)
            tokens = cold.generate([[1, 2]], GREEDY)[0].outputs[0].token_ids
        running = len(compiled)
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    with LLM(model, **shapes) as warm:
        assert len(warm.engine.runner.sizes.decode) == 2
        assert warm.generate([[1, 2]], GREEDY)[0].outputs[0].token_ids == tokens
    assert loading <= 1 < running, "at most the empty pages compile before the first prompt"
    assert cold.engine.snapshot().compilations_after_warmup == 0


@pytest.mark.matrix
def test_heads_over_the_experts_ranks_give_the_same_tokens(model):
    """The decode batch and prompt run of one sequence are rounded up to what four ranks can split."""
    shapes = SMALL | {"max_num_seqs": 1, "warm_up": False}
    with LLM(model, **shapes) as one, LLM(model, **shapes, expert_parallel_size=4, attention="tp") as four:
        assert four.engine.runner.sizes.decode == (4,) and four.engine.runner.ranks == 1
        both = [llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids for llm in (one, four)]
    assert both[0] == both[1]


def test_attention_has_two_forms_and_one_place_to_say_which():
    with pytest.raises(ValueError, match="attention must be one of dp, tp, got 'ep'"):
        EngineSettings(attention="ep")
    with pytest.raises(ValueError, match="attention is 'dp' here and 'tp' in moe"):
        EngineSettings(moe=MoEConfig(attention="tp"))
    with pytest.raises(ValueError, match="unknown key 'attention'"):
        MoEConfig.from_dict({"attention": "tp"})
