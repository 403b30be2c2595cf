"""A request whose activations overflow ends alone, and all others get the tokens that they would have got.

Others are those that run at the same time, later ones in its pages, and those with the same beginning.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from jmoe_kernels import cpu
from support.models.engines import engine_of, serve
from support.models.small import config, decoder

from jmoe.config.moe import MoEConfig
from jmoe.engine.engine import Engine
from jmoe.engine.request import SamplingParams
from jmoe.engine.schedule.pages import RankPages
from jmoe.mesh import make_mesh

POISON = 95  # the token whose values in the first layer are infinite
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
KERNELS = [
    "xla",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(isinstance(cpu.get_library(), str), reason="no C++ kernels")
    ),
]


@pytest.fixture(scope="module", params=KERNELS)
def engine(request) -> Engine:
    """Returns an engine with ten pages of 8 tokens and two seats, so that pages are used again at once.

    All weights are finite.
    """
    mesh = make_mesh()
    model = decoder(config(), mesh, MoEConfig(kernel=request.param))
    embed, values = model.embed, model.layers[0].attention.v_proj
    embed_VD, values_VD = np.array(embed[...]), np.array(values[...])
    embed_VD[:, 0], embed_VD[POISON] = 0.0, 0.0
    embed_VD[POISON, 0] = 1.0
    values_VD[:, 0] = 0.0
    values_VD[0, 0] = 3e38
    embed[...], values[...] = jnp.asarray(embed_VD), jnp.asarray(values_VD)
    return engine_of(model, mesh, seats=2, pages=10)


def healthy(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, POISON, length).tolist()


def tokens_of(engine: Engine, prompts: list[list[int]]) -> list[list[int] | str]:
    """Returns each prompt's tokens, or why it failed."""
    requests, outputs = serve(engine, prompts, GREEDY)
    return [parts[-1].error or r.token_ids for r, parts in zip(requests, outputs, strict=True)]


@pytest.mark.parametrize("shares", [False, True], ids=["apart", "sharing"])
def test_a_request_that_overflows_fails_alone(engine: Engine, shares: bool, monkeypatch):
    """It ends anywhere in its pages, in which healthy requests then begin and grow; they begin as it did."""
    good = [healthy(1, 20), healthy(2, 13)]
    monkeypatch.setattr(engine.scheduler, "page_kind", None)
    want = [tokens_of(engine, [prompt])[0] for prompt in good]
    assert not any(isinstance(each, str) for each in want)
    if shares:
        monkeypatch.undo()
    for at in (0, 3, 19):
        bad = [*good[0][:at], POISON, *healthy(4, 31 - at)]
        healthy_tokens, ended = tokens_of(engine, [good[0], bad])
        assert healthy_tokens == want[0] and "NaN" in ended
        assert tokens_of(engine, good) == want


def test_pages_of_a_request_that_failed_serve_nobody(engine: Engine):
    """A request that begins alike computes all of its own pages too."""
    before = [*healthy(8, 16), POISON, *healthy(9, 14)]
    for _ in range(2):
        hits = engine.scheduler.prefix.hits
        [ended] = tokens_of(engine, [before])
        assert "NaN" in ended and engine.scheduler.prefix.hits == hits
    assert engine.scheduler.pool.usage == 0


def test_names_are_forgotten_whoever_holds_the_page():
    pages = RankPages(4)
    used, kept = pages.allocate(2)
    pages.name(used, b"a"), pages.name(kept, b"b"), pages.name(kept, b"c")
    pages.free([kept])
    pages.forget([used, kept, kept])
    assert not pages.page_of and not pages.cached and used not in pages.blank and kept in pages.blank
    pages.free([used])
    assert sorted(pages.blank) == [0, 1, 2, 3] and not pages.cached
