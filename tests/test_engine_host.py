"""The host side of the engine: pages, scheduler, detokeniser. No jax."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jmoe.engine.pages import PagePool
from jmoe.engine.request import QueueFull, Request, SamplingParams
from jmoe.engine.scheduler import Scheduler
from jmoe.engine.step_input import Sizes
from jmoe.engine.text import Detokenizer, TextCodec


def request(name: str, prompt: int, max_tokens: int | None) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, [0] * prompt, params, lambda output: None, 0.0)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, finish and are aborted in any order: no page is lost, shared or exceeded."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(ranks=2, pages_per_rank=6, page_size=4)
        self.scheduler = Scheduler(self.pool, slots_per_rank=2, max_queue=5, max_model_len=20)
        self.order, self.entered = [], []

    @rule(prompt=st.integers(1, 12), new=st.one_of(st.none(), st.integers(0, 8)))
    def add(self, prompt, new):
        made = request(str(len(self.order)), prompt, new)
        if len(self.scheduler.waiting) == 5:
            with pytest.raises(QueueFull):
                self.scheduler.add([made])
        else:
            self.scheduler.add([made])
            self.order.append(made)

    @rule()
    def step(self):
        before = {id(r) for r in self.scheduler.running}
        step = self.scheduler.next_step()
        self.entered += [r for r in self.scheduler.running if id(r) not in before]
        if step is None:
            assert not self.scheduler.running and not self.scheduler.waiting
        elif step.prefill:
            assert len({r.rank for r in step.requests}) == len(step.requests), "one prompt a rank"
            for r in step.requests:
                r.prefilled = len(r.prompt_token_ids)
                r.token_ids.append(0)
        else:
            for r in step.requests:
                r.token_ids.append(0)

    @rule(data=st.data())
    def finish(self, data):
        if self.scheduler.running:
            self.scheduler.finish(data.draw(st.sampled_from(self.scheduler.running)))

    @rule(data=st.data())
    def abort(self, data):
        if self.order:
            chosen = data.draw(st.sampled_from(self.order))
            here = chosen in self.scheduler.running or chosen in self.scheduler.waiting
            assert (self.scheduler.drop(chosen.id) is chosen) == here

    @invariant()
    def pages_are_conserved(self):
        for rank, free in enumerate(self.pool.free):
            held = [p for r in self.scheduler.running if r.rank == rank for p in r.pages]
            assert sorted(free + held) == list(range(6))
            assert sum(r.rank == rank for r in self.scheduler.running) <= 2

    @invariant()
    def first_come_first_served(self):
        numbers = [int(r.id) for r in self.entered]
        assert numbers == sorted(numbers)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_request_goes_where_most_of_its_experts_are_and_no_rank_is_left_behind():
    wishes = {5: [0.1, 0.7, 0.2], 6: [0.6, 0.3, 0.1]}
    pool = PagePool(ranks=3, pages_per_rank=6, page_size=4)
    scheduler = Scheduler(pool, 2, 10, 20, share=lambda ids: wishes[ids[0]])
    for i, token in enumerate([5, 5, 6, 6, 6]):
        asked = request(str(i), 1, 2)
        asked.prompt_token_ids[:] = [token]
        scheduler.add([asked])
    scheduler.next_step()
    # The second 5 finds rank 1 given already; the first 6 takes what is left; then a new round begins.
    assert [r.rank for r in scheduler.running] == [1, 2, 0, 0, 1]
    scheduler.add([request("full", 1, 2), request("last", 1, 2)])
    scheduler.share = lambda ids: [1.0, 0.0, 0.0]
    scheduler.next_step()
    assert [r.rank for r in scheduler.running[5:]] == [2], "the one rank with a slot, then none"
    scheduler.finish(scheduler.running[0])
    scheduler.next_step()
    assert scheduler.running[-1].id == "last" and scheduler.running[-1].rank == 1


def test_a_request_reserves_every_page_it_can_need():
    scheduler = Scheduler(PagePool(1, 8, 4), 4, 10, max_model_len=20)
    assert scheduler.pages_needed(request("a", 5, 3)) == 2  # 5 + 2 stored tokens
    assert scheduler.pages_needed(request("a", 5, 5)) == 3
    assert scheduler.pages_needed(request("a", 5, None)) == 5  # to the end of the context
    assert scheduler.pages_needed(request("a", 8, 0)) == 2


def test_a_long_request_does_not_overtake_nor_starve():
    scheduler = Scheduler(PagePool(1, 4, 4), 4, 10, max_model_len=16)
    first, long, short = request("0", 8, 1), request("1", 15, 1), request("2", 2, 1)
    scheduler.add([first, long, short])
    assert scheduler.next_step().requests == [first]
    assert scheduler.running == [first], "the short one waits behind the long one"
    scheduler.finish(first)
    assert scheduler.next_step().requests == [long]


@given(st.integers(1, 3000))
def test_prefill_runs_cover_the_prompt_with_little_padding(left: int):
    sizes = Sizes((1,), (64, 256, 1024), 32, 1, 1)
    padded = real = 0
    while left > 0:
        size = sizes.prefill_size(left)
        assert size in sizes.prefill
        padded += size
        real += min(size, left)
        left -= size
    assert padded <= max(2 * real, 64)


# ---- text ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> TextCodec:
    """One token a byte, and a special end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    directory = tmp_path_factory.mktemp("codec")
    tokenizer.save(str(directory / "tokenizer.json"))
    return TextCodec(directory, 257)


@settings(deadline=None)
@given(text=st.text(max_size=40), stop=st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_streamed_text_is_the_text_up_to_the_first_stop(codec: TextCodec, text: str, stop: list[str]):
    text = text.encode("utf-8", "ignore").decode().replace("\ufffd", "")
    detokenizer, got = Detokenizer(codec, stop), ""
    for token in codec.encode(text):
        piece = detokenizer.push(token)
        assert "\ufffd" not in piece
        got += piece
        if detokenizer.stopped_by is not None:
            break
    else:
        got += detokenizer.flush()
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert got == text and detokenizer.stopped_by is None
    else:
        first = min(ends)  # the stop string that is complete first
        cut = min(text[:first].find(s) for s in stop if s in text[:first])
        assert got == text[:cut] and detokenizer.stopped_by in stop


def test_half_a_character_is_held_back_and_flushed(codec: TextCodec):
    detokenizer = Detokenizer(codec)
    first, second = codec.encode("é")
    assert detokenizer.push(first) == ""
    assert detokenizer.push(second) == "é"
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\ufffd", "an unfinished character shows at the end, it is not lost"


def test_codec_refusals(codec: TextCodec, tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer.json; prompts must be token ids"):
        TextCodec(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        TextCodec(tmp_path, 10)
    codec.tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 257 tokens, the model's vocabulary 10"):
        TextCodec(tmp_path, 10)
    with pytest.raises(ValueError, match="lone surrogate"):
        codec.encode("a\ud800")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be between 0 and 2"),
        ({"temperature": 2.5}, "temperature must be between 0 and 2"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_k": -2}, "top_k must be at least -1"),
        ({"seed": 2**63}, "seed must fit 64 bits"),
        ({"stop": ("",)}, "non-empty"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20"),
        ({"min_tokens": 20, "max_tokens": 4}, "min_tokens must be between 0 and max_tokens"),
    ],
)
def test_sampling_params_name_the_limit(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)
