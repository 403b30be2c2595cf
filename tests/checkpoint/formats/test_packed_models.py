"""Published forms hold the same numbers on one device and on meshes, read as they are or converted."""

import numpy as np
import pytest
from support.models import modelopt_files as files
from support.models import word_packings as words
from support.models.quantised import plain_values, quantised_paths
from support.models.quantised_pair import Writer, write_pair
from support.models.small import mesh_of

from jmoe.checkpoint import convert, load_model
from jmoe.config.moe import MoEConfig
from jmoe.config.techniques import OffloadConfig

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True}
NVFP4, FP8 = ({"quant_method": "modelopt", "quant_algo": algorithm} for algorithm in ("NVFP4", "FP8"))


def packed(pack, **kind) -> Writer:
    """Returns a writer of random codes in a packing."""
    rng = np.random.default_rng(1)

    def write(module: str, shape: tuple[int, int]):
        weight = words.random_codes(rng, shape, **{"group": 16} | kind)
        return pack(weight), weight.numbers

    return write


def modelopt(form) -> Writer:
    """Returns a writer of random weights in one of modelopt's forms."""
    rng = np.random.default_rng(1)
    return lambda module, shape: form(rng, shape)


MODELS = {
    "gptq": (GPTQ, packed(words.gptq)),
    "gptq asymmetric": (GPTQ | {"sym": False}, packed(words.gptq, sym=False)),
    "gptq 8 bits": (GPTQ | {"bits": 8, "sym": False}, packed(words.gptq, bits=8, sym=False)),
    "awq": (AWQ, packed(words.awq, sym=False)),
    "nvfp4": (NVFP4, modelopt(files.nvfp4)),
    "fp8": (FP8, modelopt(files.fp8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_load_holds_the_same_numbers(tmp_path, name):
    config, write = MODELS[name]
    write_pair(tmp_path, config, write)
    plain = plain_values(load_model(tmp_path / "plain", mesh_of((1, 1, 1))))
    convert(tmp_path / "coded", tmp_path / "converted")
    offload = MoEConfig(offload=OffloadConfig(slots_per_layer=4))
    assert quantised_paths(load_model(tmp_path / "coded", mesh_of((1, 1, 1)), offload))
    for shape in ((1, 1, 1), (2, 2, 2), (1, 2, 4)):  # four ranks cut the groups
        for source in ("coded", "converted"):
            model = load_model(tmp_path / source, mesh_of(shape))
            assert {path for path in plain if path.endswith("_proj")} < quantised_paths(model)
            for path, numbers in plain_values(model).items():
                np.testing.assert_array_equal(numbers, plain[path], err_msg=f"{source} {shape} {path}")
