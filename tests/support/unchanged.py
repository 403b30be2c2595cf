"""Writes what a change of the code's structure must not change, as texts in a folder for ``diff -r``.

    python tests/support/unchanged.py OUT        # before; again after, into another folder

The texts are the lowered steps of several settings, on emulated devices and, if libtpu is installed, for TPU
slices; tokens; the OpenAPI document; names of metrics and statistics; every command's help; the doctor's
report.
"""

import contextlib
import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["COLUMNS"] = "100"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from starlette.testclient import TestClient
from support.aot.pool_cases import KINDS
from support.models.small import config, mesh_of
from support.server.fake_engine import ByteCodec, FakeEngine, served

from jmoe import LLM, MoEConfig, SamplingParams
from jmoe.cli.main import main as command_line
from jmoe.cli.main import parser
from jmoe.engine.deployment.lowering import lower_step
from jmoe.engine.step.inputs import Sizes

jax.config.update("jax_num_cpu_devices", 8)
SIZES = Sizes((1, 4), (32,), 8, 40, 8)
LOSSY = {"binning": {"bin_width": 0.5}, "capacity": {"policy": "reroute", "phase": "both"}}
SETTINGS = {  # name: the mesh, the techniques' tables and fields of MoEConfig, fields of the model
    "plain": ((1, 1, 1), {}, {}),
    "mesh": ((2, 2, 2), {"attention": "dp"}, {}),
    "heads": ((1, 2, 4), {"attention": "tp"}, {}),
    "ragged": ((1, 8, 1), {"transport": "ragged_all_to_all"}, {}),
    "lossy": ((1, 4, 1), LOSSY, {}),
    "offload": ((1, 1, 1), {"offload": {"slots_per_layer": 4}}, {}),
    "offload on a mesh": ((2, 2, 1), {"offload": {"slots_per_layer": 2, "predictor": "none"}}, {}),
    "latent": ((1, 2, 1), {}, KINDS["latent"]),
    "sinks": ((1, 1, 1), {"kernel": "xla"}, KINDS["sinks and windows"]),
}
COMMANDS = ("serve", "generate", "eval", "profile", "place", "bench", "doctor", "convert")
BENCHES = ("serve", "throughput", "latency", "moe-layer")
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def steps() -> dict[str, str]:
    found = {}
    for name, (mesh, moe, fields) in SETTINGS.items():
        tables = {key: value for key, value in moe.items() if isinstance(value, dict)}
        settings = replace(MoEConfig.from_dict(tables), **{k: v for k, v in moe.items() if k not in tables})
        for phase, tokens in (("decode", 1), ("prefill", 32)):
            lowered = lower_step(config(**fields), settings, mesh_of(mesh), SIZES, sequences=4, tokens=tokens)
            found[f"step of {name}, {phase}"] = without_places(lowered.as_text())
    return found


def without_places(text: str) -> str:
    """Returns a lowered step without places in files and without the names of its results' fields."""
    return re.sub(r'loc\([^)]*\)|#loc.*|metadata="[^"]*"| \{jax.result_info = "[^"]*"\}', "", text)


def printed(*words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        command_line(list(words))
    return out.getvalue()


def surfaces() -> dict[str, str]:
    """Returns what users see: commands, documents, names."""
    helps = {f"help of {name}": printed(name, "--help") for name in COMMANDS}
    helps |= {f"help of bench {name}": printed("bench", name, "--help") for name in BENCHES}
    helps["help"] = parser().format_help()
    with served(FakeEngine(ByteCodec())) as client:
        helps |= answers(client)
    free = r'"room_bytes": \d+|which has [\d.]+ GiB'
    return helps | {"doctor": re.sub(free, "", printed("doctor", "--json"))}


def answers(client: TestClient) -> dict[str, str]:
    lines = client.get("/metrics").text.splitlines()
    names = [line for line in lines if line.startswith("#") and "_created" not in line]
    document = json.dumps(client.get("/openapi.json").json(), indent=1, sort_keys=True)
    keys = json.dumps(shape(client.get("/moe/stats").json()), indent=1)
    return {"openapi": document, "metrics": "\n".join(names), "statistics": keys}


def shape(value: object) -> object:
    """Returns the keys of a JSON value."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    return [shape(each) for each in value[:1]] if isinstance(value, list) else type(value).__name__


def tokens() -> dict[str, str]:
    """Returns greedy answers of the bundled model, plain and with all techniques of one device."""
    found = {}
    moe = {"plain": {}, "lossy": LOSSY, "offload": {"offload": {"slots_per_layer": 8}}}
    for name, table in moe.items():
        with LLM("tiny", moe=MoEConfig.from_dict(table), warm_up=False, max_num_seqs=4) as llm:
            outputs = llm.generate(["Once upon a time", "def main():", "2 + 2 ="], GREEDY)
            stats = json.dumps(shape(llm.engine.moe_stats()))
        found[f"tokens, {name}"] = "\n".join(str(o.outputs[0].token_ids) for o in outputs) + f"\n{stats}"
    return found


def write(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (steps() | surfaces() | tokens()).items():
        (out / f"{name}.txt").write_text(text + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
