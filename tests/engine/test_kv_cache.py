"""A KV cache of one byte a number: sizes, names of pages, and tokens that do not depend on how they came.

How a row is rounded depends on the row alone, so a request has the same tokens alone and in company, with a
shared beginning, after it gave way, and on every mesh.
"""

from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import offloaded
from support.models.engines import engine_of, prompts, serve
from support.models.small import config, decoder, mesh_of

from jmoe.config.moe import MoEConfig
from jmoe.config.parts import LatentConfig
from jmoe.config.techniques import OffloadConfig
from jmoe.engine.build import page_kind
from jmoe.engine.deployment.deployment import resolve
from jmoe.engine.deployment.found import find_model
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.engine.engine import Engine
from jmoe.engine.offload.host_runner import HostDrivenRunner
from jmoe.engine.processes.lockstep import facts_of
from jmoe.engine.processes.nodes import Nodes
from jmoe.engine.request import Request
from jmoe.mesh import make_mesh, split_attention
from jmoe.nn.kinds import page_bytes
from jmoe.tools.doctor import doctor
from jmoe.tools.evaluate import evaluate

ROOT = Path(__file__).parents[2]
NAMES = ("int8", "fp8")
MOST = ["int8", pytest.param("fp8", marks=pytest.mark.matrix)]  # of what takes long
KINDS = {
    "plain": {},
    "sinks and windows": {"attention_sinks": True, "sliding_window": 20, "qk_norm": "none"},
    "latent": {
        "latent": LatentConfig(24, 16, 8, 16), "qk_norm": "none", "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}  # fmt: skip


def engine(name: str, kind: str = "plain", mesh=None, moe=MoEConfig(), **sizes) -> Engine:
    cfg, mesh = config(kv_cache_dtype=name, **KINDS[kind]), mesh or make_mesh()
    return engine_of(decoder(cfg, mesh, moe), mesh, **sizes)


@cache
def alone(name: str, kind: str = "plain") -> list[list[int]]:
    """Returns the tokens of every prompt, each run by itself on one device."""
    with closing(engine(name, kind)) as one:
        return [serve(one, [prompt])[0][0].token_ids for prompt in prompts(9, seed=51)]


def answers(of: Engine) -> list[list[int]]:
    return [request.token_ids for request in serve(of, prompts(9, seed=51))[0]]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fp8", "sinks and windows"),
        pytest.param("int8", "latent", marks=pytest.mark.matrix),
        pytest.param("int8", "plain", marks=pytest.mark.matrix),
        pytest.param("fp8", "plain", marks=pytest.mark.matrix),
    ],
)
def test_company_and_giving_way_change_nothing(name: str, kind: str):
    with closing(engine(name, kind)) as together:
        assert answers(together) == alone(name, kind)
        assert answers(together) == alone(name, kind)  # the beginnings are in the cache now
        assert together.snapshot().prefix_hits > 0
    with closing(engine(name, kind, pages=9)) as tight:
        assert answers(tight) == alone(name, kind)
        assert tight.snapshot().preemptions > 0


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize(
    ("shape", "attention", "transport"),
    [((2, 2, 2), "dp", "all_to_all"), ((1, 8, 1), "tp", "ragged_all_to_all")],
    ids=str,
)
def test_a_mesh_generates_the_tokens_of_one_device(name: str, shape, attention: str, transport: str):
    moe = MoEConfig(attention=attention, transport=transport)
    sizes = {"seats": 8 if attention == "tp" else 4, "first": shape[1]}
    with closing(engine(name, "plain", mesh_of(shape), moe, warm_up=True, **sizes)) as on_mesh:
        assert answers(on_mesh) == alone(name)
        assert on_mesh.runner.compilations.num_after_warmup == 0


@pytest.mark.parametrize("name", MOST)
def test_portable_kernels_generate_the_same_tokens(name: str):
    with closing(engine(name, moe=MoEConfig(kernel="xla"))) as portable:
        assert portable.runner.kernels.attention == "xla"
        assert answers(portable) == alone(name)


def test_steps_driven_by_the_host_generate_the_same_tokens(tmp_path: Path):
    model, many, got = offloaded.write_model(tmp_path), offloaded.prompts(5), []
    for executor in ("graph", "host"):
        moe = MoEConfig(offload=OffloadConfig(slots_per_layer=3, executor=executor))
        with closing(offloaded.build(model, moe, warm_up=True, kv_cache_dtype="int8")) as built:
            assert isinstance(built.runner, HostDrivenRunner) == (executor == "host")
            got.append(offloaded.serve(built, many))
            assert built.runner.compilations.num_after_warmup == 0
    assert got[0] == got[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_page_takes_its_scales_along(name: str):
    with closing(engine(name)) as copying:
        runner, rng = copying.runner, np.random.default_rng(0)
        pages = jax.tree.map(
            lambda a: jax.device_put(rng.integers(0, 100, a.shape).astype(a.dtype), a.sharding),
            runner.state.pages,
        )
        before = jax.tree.map(np.asarray, pages)
        runner.state = replace(runner.state, pages=pages)
        runner.copy_pages(np.int32([2]), np.int32([5]))
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(runner.state.pages), strict=True):
            np.testing.assert_array_equal(new[5], old[2])
            np.testing.assert_array_equal(np.delete(new, 5, 0), np.delete(old, 5, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_takes_half_the_bytes(kind: str):
    """A token and head has a float32 scale, and for its numbers half the bytes of bfloat16."""
    split, arrays = split_attention(make_mesh(), "dp"), 1 if kind == "latent" else 2
    sizes = [
        page_bytes(config(dtype="bfloat16", kv_cache_dtype=name, **KINDS[kind]), split, 32)
        for name in ("auto", *NAMES)
    ]
    heads = 1 if kind == "latent" else 2
    layers = 2
    assert sizes[1] == sizes[2] == sizes[0] // 2 + arrays * layers * heads * 32 * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_deployment_counts_what_the_pages_hold(name: str):
    plain, found = (
        resolve("tiny", EngineSettings(kv_cache_dtype=each, kv_memory="4MiB")) for each in ("auto", name)
    )
    assert found.sizes.pages_per_rank > 1.85 * plain.sizes.pages_per_rank
    assert found.memory.pages <= 4 << 20
    with closing(engine(name)) as built:
        cfg, pages = built.runner.cfg, built.runner.state.pages
        held = sum(a.nbytes for a in jax.tree.leaves(pages))
        assert held == 40 * page_bytes(cfg, split_attention(make_mesh(), "dp"), 8)
        codes, scales = pages[0].kv[0], pages[0].scales
        assert codes.dtype == (jnp.int8 if name == "int8" else jnp.uint8)
        assert scales is not None and scales[0].shape == codes.shape[:-1]


def test_doctor_says_how_the_cache_is_kept():
    for name in ("auto", *NAMES):
        report = doctor("tiny", EngineSettings(kv_cache_dtype=name, kv_memory="4MiB"))
        [row] = [row for row in report["choices"] if row["what"] == "KV cache kept as"]
        if name == "auto":
            assert row["choice"] == "uint16"
        else:
            assert row["choice"] == name and "a float32 scale for each token and head" in row["why"]


def test_pages_of_another_kind_have_other_names():
    request = Request("a", [1, 2, 3], offloaded.GREEDY, lambda output: None, 0.0)
    kinds = set()
    for name in ("auto", *NAMES):
        with closing(engine(name)) as built:
            kinds.add(page_kind(request, built.runner))
    assert len(kinds) == 3


def test_all_processes_must_agree_on_it():
    nodes = Nodes(nnodes=2, node_rank=1, dist_init_addr="localhost:1")
    for name in ("auto", *NAMES):
        facts = facts_of(nodes, find_model("tiny"), EngineSettings(kv_cache_dtype=name))
        assert facts["kv_cache_dtype"] == name


def test_all_processes_must_have_the_same_commit():
    nodes, model = Nodes(nnodes=2, node_rank=1, dist_init_addr="localhost:1"), find_model("tiny")
    facts = [facts_of(nodes, replace(model, commit=commit), EngineSettings()) for commit in ("a", "b")]
    assert facts[0] != facts[1]


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, int8, fp8, got 'fp4'"):
        EngineSettings(kv_cache_dtype="fp4")


@pytest.mark.parametrize(
    ("name", "most"), [("int8", 5e-4), pytest.param("fp8", 5e-3, marks=pytest.mark.matrix)]
)
def test_the_bundled_models_perplexity_stays(name: str, most: float, tmp_path: Path):
    """The difference of the mean loss is the relative difference of the perplexity."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "docs" / "serving.md").read_text() + (ROOT / "docs" / "extending.md").read_text())
    losses = [
        evaluate("tiny", [text], settings=EngineSettings(kv_cache_dtype=each, kv_memory="64MiB"))[
            "nll_per_token"
        ]
        for each in ("auto", name)
    ]
    assert abs(losses[1] - losses[0]) < most
