"""Tests the result of a model and settings on a machine and in its memory, for ``serve`` and ``doctor``."""

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax
import pytest
from jmoe_kernels import cpu
from jmoe_kernels.grouped_mlp import IMPLEMENTATIONS
from jmoe_kernels.quantised import Coding
from support.models.small import config

from jmoe.blueprint import Blueprint
from jmoe.checkpoint import load_model
from jmoe.checkpoint.params import abstract_decoder
from jmoe.checkpoint.quantised.codings import CODINGS
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig
from jmoe.engine.build import build_engine
from jmoe.engine.deployment import needs, room
from jmoe.engine.deployment.deployment import resolve
from jmoe.engine.deployment.needs import within
from jmoe.engine.deployment.room import Room
from jmoe.engine.deployment.settings import BUNDLED, EngineSettings
from jmoe.engine.offload.build import cache_bytes
from jmoe.mesh import make_mesh
from jmoe.models.decoder import make_blueprint
from jmoe.nn import kinds
from jmoe.nn.grouped_query import GroupedQueryAttention
from jmoe.param import ParamMaker
from jmoe.tools.doctor import doctor

TINY = BUNDLED["tiny"]
PAGE = 6 * 2 * 32 * 128 * 2  # 6 layers, keys and values, 32 tokens, 2 heads of 64, bfloat16
CONTEXT = 32  # pages of the bundled model's 1,024 tokens


@pytest.fixture
def machine(monkeypatch):
    """Returns a function that sets the memory of the machine."""

    def has(size: int) -> None:
        monkeypatch.setattr(needs, "device_room", lambda device, sharing: Room(size, "this test"))

    return has


def small(**changes) -> EngineSettings:
    return EngineSettings(**({"max_num_seqs": 4, "max_num_batched_tokens": 64} | changes))


def taken(settings: EngineSettings) -> int:
    """Returns the bytes of everything but pages."""
    found = resolve("tiny", settings).memory
    return found.total - found.pages


def test_the_default_pages_are_those_of_all_contexts_where_there_is_room(machine):
    machine(64 << 30)
    found = resolve("tiny", small())
    assert found.sizes.pages_per_rank == 4 * CONTEXT and found.notes == ()
    assert found.memory.pages == 4 * CONTEXT * PAGE
    assert 0 <= (2 << 30) - resolve("tiny", small(max_num_seqs=4096)).memory.pages < PAGE


def test_fewer_pages_where_there_is_less_and_the_context_that_fits_is_named(machine):
    machine(64 << 30)
    rest = taken(small())
    machine(rest + 2 * 50 * PAGE)
    found = resolve("tiny", small())
    assert (found.sizes.pages_per_rank, found.max_model_len, found.notes) == (50, 1024, ())
    machine(rest + 2 * 10 * PAGE)
    for asked in ({}, {"max_model_len": 1024}):
        with pytest.raises(ValueError) as caught:
            resolve("tiny", small(**asked))
        text = str(caught.value)
        assert "a context of 1024 tokens (max_model_len) needs a KV cache of 3 MiB on each rank" in text
        assert text.endswith("holds 320 tokens: max_model_len 320 fits")
    assert resolve("tiny", small(max_model_len=320)).sizes.pages_per_rank == 10
    machine(rest)
    with pytest.raises(ValueError, match="holds 0 tokens: not one page fits"):
        resolve("tiny", small())


def test_memory_that_is_set_holds_a_context_or_shortens_it():
    found = resolve("tiny", small(kv_memory="1MiB"))
    assert (found.max_model_len, found.sizes.pages_per_rank) == (
        320,
        10,
    ) and "kv_memory 1 MiB" in found.notes[0]
    with pytest.raises(ValueError, match=r"needs a KV cache of 1.5 MiB on each rank, and kv_memory 1 MiB"):
        resolve("tiny", small(kv_memory="1MiB", max_model_len=512))
    assert resolve("tiny", small(kv_memory="1MiB", max_model_len=320)).notes == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_memory": "9000GiB"}, "KV cache 8.79 TiB = 8.79 TiB on each device, which has 4 GiB (this"),
        ({"max_num_seqs": 65536}, "a step "),
        ({"max_num_batched_tokens": 1 << 20, "max_num_seqs": 2048}, "a step "),
        ({"moe": {"slots_per_layer": 2, "predictor": "expert_map", "store_size": 10**12}}, "weights "),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_one_line_with_the_sizes(machine, settings: dict, message: str):
    machine(4 << 30)
    if "moe" in settings:
        settings = {"moe": MoEConfig.from_dict({"offload": settings["moe"]})}
    with pytest.raises(ValueError) as caught:
        resolve("tiny", small(**settings))
    text = str(caught.value)
    assert "the model does not fit the memory: weights " in text and message in text and "\n" not in text


def test_of_ten_million_positions_those_that_fit_are_named(tmp_path: Path, machine):
    """The context is Llama 4 Scout's: it takes 1.9 TiB in the whole model, and 60 GiB in this one."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 10_485_760}
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config))
    machine(8 << 30)
    with pytest.raises(ValueError, match=r"a context of 10485760 tokens \(max_model_len\)") as caught:
        resolve(model, small())
    fits = int(str(caught.value).split()[-2])
    assert 1 << 20 < resolve(model, small(max_model_len=fits)).max_model_len == fits < 10_485_760


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b"])
def test_weights_are_counted_without_describing_every_layer(name: str):
    path = Path(__file__).parents[2] / f"configs/model/{name}.toml"
    cfg = ModelConfig.from_file(path).first(5)
    mesh, settings = make_mesh(), EngineSettings()
    whole = sum(spec.nbytes for spec in abstract_decoder(make_blueprint(cfg, settings.moe, mesh))[1].values())
    assert needs.weight_bytes(cfg, settings, mesh) == whole


class Gated(GroupedQueryAttention):
    """A kind of attention with one more weight."""

    def __init__(self, blueprint: Blueprint, layer: int, make: ParamMaker):
        super().__init__(blueprint, layer, make)
        self.gate_proj = make((blueprint.cfg.hidden_size, 8), (None, None))


@pytest.mark.parametrize("offload", [None, OffloadConfig(slots_per_layer=4, predictor="none")])
def test_weights_of_a_model_that_mixes_kinds_of_attention_are_counted(monkeypatch, offload):
    kind_of = {"full_attention": "grouped_query", "sliding_attention": "gated"}
    monkeypatch.setattr(ModelConfig, "attention_kind", lambda self, layer: kind_of[self.layer_types[layer]])
    monkeypatch.setattr(kinds, "KINDS", {**kinds.KINDS, "gated": Gated})
    full, sliding = "full_attention", "sliding_attention"
    cfg = config(num_hidden_layers=4, layer_types=(full, sliding, sliding, sliding), sliding_window=8)
    mesh, settings = make_mesh(), EngineSettings(moe=MoEConfig(offload=offload))
    specs = abstract_decoder(make_blueprint(cfg, settings.moe, mesh))[1].values()
    cache = cache_bytes(cfg, settings.moe.offload, mesh)
    assert needs.weight_bytes(cfg, settings, mesh) == sum(spec.nbytes for spec in specs) + cache


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
def test_weights_of_a_device_are_its_share():
    cfg = ModelConfig.from_file(Path(__file__).parents[2] / "configs/model/qwen3-30b-a3b.toml").first(3)
    mesh = make_mesh(2, 4)
    specs = abstract_decoder(make_blueprint(cfg, MoEConfig(), mesh))[1].values()
    share = sum(spec.nbytes // (4 if "expert" in str(spec.sharding.spec) else 1) for spec in specs)  # pyright: ignore
    assert needs.weight_bytes(cfg, EngineSettings(expert_parallel_size=4), mesh) == share


def test_the_count_of_the_bundled_model_is_what_loading_takes():
    model = load_model(TINY, make_mesh())
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert abs(resolve("tiny", small()).memory.weights - held) < held / 50


def test_doctor_says_what_is_built():
    settings = small(kv_memory="1MiB", moe=MoEConfig(transport="all_to_all"))
    report = doctor("tiny", settings)
    with closing(build_engine("tiny", settings, warm_up=False)) as engine:
        assert report["model"]["max_model_len"] == engine.max_model_len == 320
        assert report["kv_cache"]["pages_per_rank"] == engine.runner.sizes.pages_per_rank
        assert report["shapes"]["decode_sequences"] == list(engine.runner.sizes.decode)
        assert report["shapes"]["prefill_tokens"] == list(engine.runner.sizes.prefill)
    assert [note.split(" has no effect")[0][:14] for note in report["notes"]] == [
        "a context of 1",
        "moe.transport ",
    ]
    assert report["memory_per_device"]["kv_bytes"] == 10 * PAGE
    for bad in ({"kv_memory": "9000GiB"}, {"max_model_len": 10**6}):
        said = []
        for run in (lambda s: doctor("tiny", s), lambda s: build_engine("tiny", s)):
            with pytest.raises(ValueError) as caught:
                run(small(**bad))
            said.append(str(caught.value).split(" on each device, which has")[0])
        assert said[0] == said[1]


def test_memory_that_runs_out_all_the_same_is_one_line():
    found = resolve("tiny", small())
    for error in (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"), MemoryError()):
        with (
            pytest.raises(ValueError, match=r"^memory ran out although weights .* was expected"),
            within(found.memory),
        ):
            raise error
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), within(found.memory):
        raise jax.errors.JaxRuntimeError("INTERNAL: other")


# ---- the machine's memory --------------------------------------------------------------------------


def test_a_group_leaves_its_limit_less_what_the_kernel_keeps(tmp_path: Path):
    for name, text in (("max", "1000000"), ("current", "700000"), ("stat", "anon 1\ninactive_file 200000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    names = "memory.max", "memory.current", "inactive_file"
    assert room._left(tmp_path, *names) == 500_000
    (tmp_path / "memory.max").write_text("max")
    assert room._left(tmp_path, *names) is None
    (tmp_path / "memory.max").write_text(str(2**63 - 4096))
    assert room._left(tmp_path, *names) is None


def test_the_least_of_all_limits_is_the_room(monkeypatch):
    rooms = {"_machine": 3000, "_cgroups": 1000, "_limits": 2000}
    for name, size in rooms.items():
        monkeypatch.setattr(room, name, lambda size=size, name=name: iter([Room(size, name)]))
    assert room.host_room() == Room(1000, "_cgroups")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_an_address_space_that_is_too_small_is_one_line():
    """With 1 GiB more than Python and jax take, the pages do not fit; with little, nothing starts."""
    limited = (
        "import resource, sys; from jmoe.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_AS, (900 << 20,) * 2)\n"
        "sys.exit(main(['generate', 'tiny', '--prompt', 'x']))"
    )
    ran = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "") and "starting takes 1 GiB: raise the limit" in ran.stderr
    code = (
        "import resource, sys; import jax; jax.devices()\n"
        "from jmoe.engine.deployment.room import host_room\n"
        "from jmoe.cli.main import main\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30) + (256 << 20),) * 2)\n"
        "sys.exit(main(['doctor', 'tiny', '--kv-memory', '2GiB']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == "", ran.stderr
    assert "(address space, ulimit -v)" in ran.stderr and ran.stderr.count("\n") == 1


def notes_with(word: str, **settings) -> list[str]:
    """Returns the notes that have the word; ``doctor`` has the same notes."""
    found = small(max_model_len=32, **settings)
    notes = resolve("tiny", found).notes
    assert doctor("tiny", found)["notes"] == list(notes)
    return [note for note in notes if word in note]


def dequantised(**settings) -> list[str]:
    return notes_with("dequantised", **settings)


def test_weights_whose_activations_are_not_rounded_are_named(monkeypatch):
    asked = {"activation_dtype": "int8"}
    (note,) = notes_with("activation_dtype", **asked)
    assert note == "activation_dtype = 'int8' has no effect because no weight is quantised"
    dense, experts = notes_with("activation_dtype", quantization="int8", moe=MoEConfig(kernel="xla"), **asked)
    assert dense == (
        "activation_dtype = 'int8' has no effect on 25, such as embed; XLA's products take no codes "
        "(int8, one scale a row)"
    )
    assert experts.endswith("; 'xla' multiplies with no codes") and " on 12, such as layers.0.moe" in experts


@pytest.mark.skipif(isinstance(cpu.get_library(), str), reason="no C++ kernels here")
def test_no_line_is_told_where_activations_are_rounded():
    for quantization in ("int8", "int4", "fp8"):
        assert notes_with("activation_dtype", quantization=quantization, activation_dtype="int8") == []


@pytest.mark.parametrize(
    ("coding", "tpu", "gpu"),
    [
        (Coding("int8", None), None, None),
        (Coding("int4", 128), None, None),
        (Coding("int4", 32), None, "int8 products of int4 have 64 numbers, and groups have 32"),
        (Coding("int4", 64, has_lows=True), None, "adds lows"),
        (Coding("e4m3", None), "two terms of e4m3", "multiplies e4m3 as bfloat16"),
        (Coding("e2m1", 32), None, "multiplies e2m1 as bfloat16"),
    ],
)
def test_each_platform_says_which_codings_it_multiplies_with_rounded_activations(coding, tpu, gpu):
    for name, expected in (("pallas_tpu", tpu), ("pallas_gpu", gpu)):
        why = IMPLEMENTATIONS[name].why_unrounded(coding)
        assert (why is None) == (expected is None) and (expected or "") in (why or "")


def test_dense_weights_without_a_kernel_are_named():
    portable = MoEConfig(kernel="xla")
    assert dequantised(moe=portable) == []
    assert dequantised(quantization="int4", quantize="experts", moe=portable) == []
    (note,) = dequantised(quantization="int8", moe=portable)
    assert note == (  # the tied head and the four matrices of attention in six layers
        "dense weights that are dequantised in every step: 25, such as embed; XLA's products take no codes "
        "(int8, one scale a row)"
    )


@pytest.mark.skipif(isinstance(cpu.get_library(), str), reason="no C++ kernels here")
def test_codings_that_the_kernel_of_dense_products_does_not_take_are_named(monkeypatch):
    assert dequantised(quantization="int8") == []
    (note,) = dequantised(quantization="int8", tensor_parallel_size=2)
    assert ": 1, such as embed; XLA's products take no codes" in note  # the tied head, which XLA splits
    monkeypatch.setitem(CODINGS, "int8", Coding("int8", 8))
    (note,) = dequantised(quantization="int8")
    assert "; weights are quantised (int8, groups of 8); the kernel takes groups of 16, 32" in note
