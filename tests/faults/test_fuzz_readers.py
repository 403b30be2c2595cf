"""Every reader of files and requests reads damaged input, or refuses it in one line.

Every run has some hundred inputs for each reader. With ``-m fuzz`` there are ten thousand for each, or as
many as fit in half a minute.
"""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save
from support.fuzzing import Reader, fuzz
from support.models import hf_tiny
from support.models.routed import VOCAB, builder_for, planted_homes, planted_requests
from support.server.chat_models import NO_CALLS

from jmoe.checkpoint import convert, read_config
from jmoe.checkpoint.converted.manifest import MANIFEST, read_manifest, verify_files
from jmoe.checkpoint.facts import end_tokens
from jmoe.checkpoint.hf.reader import HFCheckpoint
from jmoe.checkpoint.load import match, read_param
from jmoe.checkpoint.params import abstract_decoder
from jmoe.checkpoint.workers import Workers
from jmoe.cli.flags import read_serve_config
from jmoe.config.moe import MoEConfig
from jmoe.engine.text.codec import TextCodec
from jmoe.mesh import make_mesh
from jmoe.models.decoder import make_blueprint
from jmoe.placement.placement import Placement
from jmoe.placement.profile import Profile
from jmoe.placement.tables import Tables
from jmoe.server.errors import ApiError
from jmoe.server.request.checks import check_chat, check_completion
from jmoe.server.request.decoding import decode
from jmoe.server.request.schema import ChatRequest, CompletionRequest
from jmoe.server.template.chat_template import ChatTemplate, load_chat_template, load_turn_ends

FEW, MANY, HALF_A_MINUTE = 150, 10_000, 30.0
GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"num_hidden_layers": 1, "vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "head_dim": 4}
CONFIG = hf_tiny.hf_config(**SMALL)
WEIGHTS = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": save(hf_tiny.random_tensors(CONFIG), {"format": "pt"}),
}


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def as_json(files: dict[str, object]) -> dict[str, bytes]:
    return {name: json.dumps(value).encode() for name, value in files.items()}


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


# ---- weights ---------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> None:
    with HFCheckpoint(folder) as checkpoint:
        for name, info in checkpoint.tensors.items():
            checkpoint.read_into(name, np.empty(info.shape, np.float32))


def safetensors(tmp: Path) -> Reader:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1.5], np.float16),
        "c": np.zeros((0, 4), np.float32),
    }
    return Reader("safetensors", {"model.safetensors": save(tensors, {"format": "pt"})}, read_tensors)


def index(tmp: Path) -> Reader:
    files, where = {}, {}
    for i, names in enumerate((["a", "b"], ["c"])):
        file = f"model-{i}.safetensors"
        files[file] = save({n: np.ones(3, np.float32) for n in names})
        where |= dict.fromkeys(names, file)
    name = "model.safetensors.index.json"
    files |= as_json({name: {"metadata": {"total_size": 36}, "weight_map": where}})
    return Reader("index", files, read_tensors, damaged=(name,))


def weights(tmp: Path) -> Reader:
    """Does everything that ``load_model`` does, except to put arrays on devices."""
    (tmp / "config.json").write_bytes(WEIGHTS["config.json"])
    blueprint = make_blueprint(read_config(tmp), MoEConfig(), one_device())

    def read(folder: Path) -> None:
        with HFCheckpoint(folder) as checkpoint, Workers() as workers:
            _, specs, table = match(checkpoint, blueprint, own_dtypes=True)
            for path, spec in specs.items():
                read_param(checkpoint, spec, table[path], workers)

    return Reader("weights", WEIGHTS, read, damaged=("model.safetensors",))


# ---- configurations --------------------------------------------------------------------------------


def configs(tmp: Path) -> Reader:
    files = {f"{d.name}/config.json": (d / "config.json").read_bytes() for d in sorted(GOLDEN.iterdir())}
    generation = {"eos_token_id": [0, 5], "stop_strings": ["</s>"], "temperature": 0.6, "bos_token_id": 1}
    files |= as_json({"mixtral/generation_config.json": generation})

    def read(folder: Path) -> None:
        for family in sorted(folder.iterdir()):
            end_tokens(family, read_config(family))
            load_turn_ends(family)

    return Reader("configs", files, read)


def moe_json(tmp: Path) -> Reader:
    moe = {"transport": "replicated", "offload": {"slots_per_layer": 2, "predictor": "next_gate"}}
    return Reader(
        "moe json", as_json({"moe": moe}), lambda folder: MoEConfig.from_text(text_of(folder / "moe"))
    )


def moe_toml(tmp: Path) -> Reader:
    text = b'[moe]\ntransport = "replicated"\n\n[moe.offload]\nslots_per_layer = 2\npredictor = "next_gate"\n'
    read = lambda folder: MoEConfig.from_text(str(folder / "moe.toml"))  # noqa: E731
    return Reader("moe toml", {"moe.toml": text}, read)


def serve_toml(tmp: Path) -> Reader:
    text = b"""model = "tiny"
port = 8000
max_num_seqs = 4
kv_memory = "64MiB"
enable_prefix_caching = true
dispatch = ["load"]
api_key = "k"
[moe]
transport = "replicated"
"""
    return Reader("serve toml", {"f.toml": text}, lambda folder: read_serve_config(folder / "f.toml"))


# ---- text ------------------------------------------------------------------------------------------

TEMPLATE = b"""{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' and loop.index0 % 2 %}
{{ raise_exception('no') }}{% endif %}[{{ m.role }}]{{ m['content'] | trim }}{% set x = namespace(a=1) %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% endfor %}{{ 'a' * 3 }}
{%- macro f(a) %}{{ a }}{% endmacro %}{{ f(1) }}"""


def templates(tmp: Path) -> Reader:
    return Reader("templates", {"t": TEMPLATE}, lambda folder: ChatTemplate(text_of(folder / "t"), {}))


def template_files(tmp: Path) -> Reader:
    special = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    config = special | {"chat_template": [{"name": "default", "template": "{{ messages }}"}]}
    files = as_json({"tokenizer_config.json": config, "special_tokens_map.json": special})
    return Reader("template files", files, load_chat_template)


def tokenizers(tmp: Path) -> Reader:
    hf_tiny.write_tokenizer(tmp)
    tokenizer = json.loads((tmp / "tokenizer.json").read_text())
    added = {"content": "<s>", "special": True}
    added |= dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    tokenizer["added_tokens"] = [{"id": 256, **added}]
    config = {"bos_token": "<s>", "add_bos_token": True, "added_tokens_decoder": {"256": added}}

    def read(folder: Path) -> None:
        codec = TextCodec(folder, 300)
        codec.decode(codec.encode("Hello <s> world"))

    special = {"bos_token": "<s>"}
    files = {"tokenizer_config.json": config, "special_tokens_map.json": special}
    return Reader("tokenizers", as_json({"tokenizer.json": tokenizer} | files), read)


# ---- profiles, placements, converted checkpoints ---------------------------------------------------


def saved(tmp: Path, thing: Profile | Placement) -> dict[str, bytes]:
    thing.save(tmp / "made.npz")
    return {"made.npz": (tmp / "made.npz").read_bytes()}


def profile(tmp: Path) -> Reader:
    homes = planted_homes(8, 4)
    builder = builder_for(homes)
    for request in planted_requests(homes, requests=2):
        builder.add(request)
    files = saved(tmp, builder.finish("m", np.zeros(VOCAB, np.int32)))
    return Reader("profile", files, lambda folder: Profile.load(folder / "made.npz"))


def placement(tmp: Path) -> Reader:
    rng = np.random.default_rng(0)
    shares, nexts = rng.random((2, 20, 2)).astype(np.float16), rng.random((2, 4, 2)).astype(np.float16)
    tables = Tables(
        shares.argmax(-1).astype(np.int16), shares.max(-1), shares,
        nexts.argmax(-1).astype(np.int16), nexts.max(-1), nexts,
    )  # fmt: skip
    files = saved(tmp, Placement(np.stack([np.arange(8), np.arange(8)[::-1]]), 2, "m", tables))
    return Reader("placement", files, lambda folder: Placement.load(folder / "made.npz"))


def converted(tmp: Path) -> dict[str, bytes]:
    (tmp / "hf").mkdir()
    for name, data in WEIGHTS.items():
        (tmp / "hf" / name).write_bytes(data)
    convert(tmp / "hf", tmp / "out")
    found = (p for p in (tmp / "out").rglob("*") if p.is_file())
    return {p.relative_to(tmp / "out").as_posix(): p.read_bytes() for p in found}


def manifest(tmp: Path) -> Reader:
    read = lambda folder: verify_files(folder, read_manifest(folder))  # noqa: E731
    return Reader("manifest", converted(tmp), read, damaged=(MANIFEST,))


def orbax(tmp: Path) -> Reader:
    """Reads damaged files that still have the right checksums in the manifest."""
    from jmoe.checkpoint.converted.orbax_io import grouped, restore_group

    files = converted(tmp)
    _, specs = abstract_decoder(make_blueprint(read_config(tmp / "hf"), MoEConfig(), one_device()))
    top = {path: specs[path] for path in grouped(specs)["top"]}
    damaged = tuple(name for name in files if name.startswith("params/top/"))
    return Reader("orbax", files, lambda folder: restore_group(folder, "top", top), damaged=damaged)


# ---- requests --------------------------------------------------------------------------------------


def bodies(tmp: Path) -> Reader:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]
    chat = {
        "model": "m", "messages": messages, "n": 1, "stream": True, "stream_options": {"include_usage": True},
        "stop": ["a"], "tools": [tool], "tool_choice": "none", "logprobs": True, "top_logprobs": 2,
        "logit_bias": {"5": 1.5},
    }  # fmt: skip
    plain = {"model": "m", "prompt": ["ab", "cd"], "max_tokens": 3, "top_p": 0.5, "echo": True, "seed": 1}

    def read(folder: Path) -> None:
        check_chat(decode((folder / "chat").read_bytes(), ChatRequest), NO_CALLS)
        check_completion(decode((folder / "plain").read_bytes(), CompletionRequest))

    return Reader("bodies", as_json({"chat": chat, "plain": plain}), read, refusals=(ApiError,))


READERS = (
    safetensors, index, weights, configs, moe_json, moe_toml, serve_toml, templates, template_files,
    tokenizers, profile, placement, manifest, orbax, bodies,
)  # fmt: skip
SLOW = {orbax: 30, weights: 50, configs: 50}  # inputs in every run


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_damaged_input_is_read_or_refused(reader, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("read"), reader(tmp_path_factory.mktemp("made"))
    assert fuzz(made, folder, count=SLOW.get(reader, FEW), seconds=math.inf) > 0


@pytest.mark.fuzz
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_much_damaged_input_is_read_or_refused(reader, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("read"), reader(tmp_path_factory.mktemp("made"))
    assert fuzz(made, folder, count=MANY, seconds=HALF_A_MINUTE) > 0
