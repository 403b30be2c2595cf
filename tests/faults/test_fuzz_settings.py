"""Mutated settings and model configurations are read, or refused in one line, within a second.

Every run has a few mutations of each. ``pytest -m fuzz`` has 10,000 of each.
"""

import copy
import json
import math
import random
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.least_time import within

from jmoe.checkpoint import read_config
from jmoe.cli.flags import read_serve_config
from jmoe.config.model import ModelConfig
from jmoe.config.moe import MoEConfig
from jmoe.engine.deployment.settings import EngineSettings
from jmoe.nn.rope import frequencies

GOLDEN = Path(__file__).parents[1] / "golden"
FEW, MANY = 60, 10_000
LONGEST = 1.0  # the seconds that one file may take

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 31, 1.5, 3.0, -0.5, 0.0, "", "x", "8", "2GiB", "no", "auto", [], {},
    [1], [[1]], ["x"], [None], {"a": 1}, {"a": {"b": [1]}}, 2**31, 2**31 - 1, 2**63, 10**12, 10**30, 10**400,
    1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), "\ud800", "\x00\n", "é" * 300,
    [0] * 3000,
]  # fmt: skip
ROPES: list[dict[str, Any]] = [
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32,
     "beta_fast": 32, "beta_slow": 1, "mscale": 0.9, "mscale_all_dim": 0.6, "truncate": False},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1], "long_factor": [1.0, 2.0],
     "short_mscale": 1.2, "long_mscale": 1.3, "factor": 4.0, "original_max_position_embeddings": 32},
    {"type": "linear", "factor": 2.0},
]  # fmt: skip
EXTRA = {
    "n_group": 1, "topk_group": 1, "clip_qkv": 8.0, "sliding_window": 4, "layer_types": ["full_attention"],
    "moe_layers": [1], "no_rope_layers": [1, 0], "mlp_only_layers": [0], "decoder_sparse_step": 2,
    "dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}, "head_dim": 8,
    "text_config": {}, "logits_scaling": 2.0,
    "routed_scaling_factor": 1.0, "eos_token_id": [1, 2], "original_max_position_embeddings": 32,
}  # fmt: skip
MOE = {
    "transport": "replicated", "kernel": None,
    "binning": {"method": "affinity", "bin_width": 0.5, "k0": 3, "keep": 0.5, "local_bonus": 0.0,
                "resident_bonus": 0.0},
    "capacity": {"factor": 1.5, "policy": "reroute", "metric": "score", "scope": "expert", "phase": "both",
                 "rounds": 4},
    "shuffle": {"placement": "p.npz", "tokens": True, "requests": False, "history": False},
    "offload": {"memory": "1GiB", "predictor": "expert_map", "eviction": "lru", "prefetch_distance": 2,
                "prefetch_per_layer": 2, "store": "s.npz", "store_size": 10, "executor": "graph"},
}  # fmt: skip
SERVE = {
    "host": "127.0.0.1", "port": 8000, "max_num_seqs": 4, "kv_memory": "2GiB", "dispatch": ["prefix", "load"],
    "enable_prefix_caching": True, "request_timeout": 2.5, "api_key": "k", "log_level": "info", "nnodes": 1,
    "moe": {key: value for key, value in MOE.items() if value is not None},
}  # fmt: skip


def mutated(rng: random.Random, values: Any) -> Any:
    """Returns a copy in which one to three places have other values, are absent, or are new."""
    values = json.loads(json.dumps(values))
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = values
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.3:
                break
            place = place[key]
        odd = copy.deepcopy(rng.choice(ODD))
        if isinstance(place, dict) and (not keys or rng.random() < 0.1):
            place[rng.choice(("x", "", "moe", "rope_scaling", "a" * 5000, "\ud800"))] = odd
        elif rng.random() < 0.1 and keys:
            del place[key]
        elif keys:
            place[key] = odd
    return values


def bent(rng: random.Random, text: str) -> bytes:
    """Returns the text's bytes. In one file of three, some bytes are changed, cut out or written twice."""
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.66:
        return bytes(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        some = raw[at : at + rng.randint(1, 20)]
        new = rng.choice((some * 2, b"", bytes([rng.randrange(256)]), b"[" * 3000, b"9" * 5000, b'"', b"\n"))
        raw[at : at + len(some)] = new
    return bytes(raw)


def toml(values: dict[str, Any], name: str = "") -> str:
    """Returns text that is almost TOML. A value that TOML cannot write becomes something that it refuses."""
    plain = {k: v for k, v in values.items() if not isinstance(v, dict)}
    lines = [f"[{name}]"] * bool(name) + [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in plain.items()]
    tables = [toml(v, f"{name}.{json.dumps(k)}".strip(".")) for k, v in values.items() if isinstance(v, dict)]
    return "\n".join([*lines, *tables]).replace("NaN", "nan").replace("Infinity", "inf")


def check(read: Callable[[bytes], object], files: list[bytes]) -> int:
    """Returns how many files were read. The others must be refused in one line, and none may take long."""

    def is_read(raw: bytes) -> bool:
        try:
            read(raw)
        except ValueError as error:
            assert "\n" not in str(error) and 0 < len(str(error)) < 2000, raw[:2000]
            return False
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{raw[:4000]!r}") from error
        return True

    return sum(within(LONGEST, partial(is_read, raw), raw[:2000]) for raw in files)


def counts(few: int = FEW) -> list[Any]:
    return [few, pytest.param(MANY, marks=pytest.mark.fuzz)]


@pytest.mark.parametrize("count", counts(30 * len(list(GOLDEN.iterdir()))))
def test_any_config_json_is_a_model_or_one_line(tmp_path: Path, count: int):
    rng, files = random.Random(0), []
    seeds = [json.loads((d / "config.json").read_text()) for d in sorted(GOLDEN.iterdir())]
    for i in range(count):
        values = dict(seeds[i % len(seeds)])
        if rng.random() < 0.5:
            values["rope_parameters"] = rng.choice(ROPES)
        values |= {key: EXTRA[key] for key in rng.sample(sorted(EXTRA), rng.randint(0, 2))}
        if rng.random() < 0.05:
            values = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": values}
        files.append(bent(rng, json.dumps(mutated(rng, values))))

    def read(raw: bytes) -> None:
        (tmp_path / "config.json").write_bytes(raw)
        cfg = read_config(tmp_path)
        dim = cfg.head_dim if cfg.latent is None else cfg.latent.qk_rope_head_dim
        if dim > 1024:
            return
        for tokens in (1, cfg.max_position_embeddings):
            turns, scale = frequencies(dim, cfg.rope.for_context(tokens))
            assert np.isfinite(turns).all() and math.isfinite(scale), raw[:4000]

    assert check(read, files) > count // 20, "some are models"


@pytest.mark.parametrize("count", counts())
def test_any_moe_config_is_read_or_one_line(tmp_path: Path, count: int):
    rng = random.Random(1)
    tables = [{key: MOE[key] for key in rng.sample(sorted(MOE), rng.randint(1, 3))} for _ in range(count)]
    files = [bent(rng, json.dumps(mutated(rng, table))) for table in tables]
    good = check(lambda raw: MoEConfig.from_text("{" + raw.decode("utf-8", "surrogateescape")[1:]), files)
    assert good > 0

    def read(raw: bytes) -> None:
        (path := tmp_path / "moe.toml").write_bytes(raw)
        MoEConfig.from_text(str(path))

    check(read, [bent(rng, toml(mutated(rng, {"moe": table}))) for table in tables])


@pytest.mark.parametrize("count", counts())
def test_any_serve_config_is_read_or_one_line(tmp_path: Path, count: int):
    rng = random.Random(2)

    def read(raw: bytes) -> None:
        (path := tmp_path / "serve.toml").write_bytes(raw)
        values = read_serve_config(path)
        known = EngineSettings.__dataclass_fields__
        EngineSettings(**{key: value for key, value in values.items() if key in known})

    assert check(read, [bent(rng, toml(mutated(rng, SERVE))) for _ in range(count)]) > count // 20


@pytest.mark.parametrize("count", counts())
def test_any_model_in_toml_is_read_or_one_line(tmp_path: Path, count: int):
    rng = random.Random(3)
    folder = Path(__file__).parents[2] / "configs" / "model"
    seeds = [tomllib.loads(path.read_text()) for path in sorted(folder.glob("*.toml"))]

    def read(raw: bytes) -> None:
        (path := tmp_path / "model.toml").write_bytes(raw)
        ModelConfig.from_file(path)

    files = [bent(rng, toml(mutated(rng, seeds[i % len(seeds)]))) for i in range(count)]
    assert check(read, files) > 0
