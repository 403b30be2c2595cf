"""A tiny Qwen3-MoE in a quantised format and, in a second directory, as plain float32 numbers."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from support.models import hf_tiny

from jmoe.checkpoint import load_model
from jmoe.checkpoint.hf.reader import HFCheckpoint
from jmoe.config.moe import MoEConfig
from jmoe.mesh import make_mesh
from jmoe.models.decoder import Decoder
from jmoe.nn.sequences import Sequences

# a writer returns what is stored of a module by the name of each tensor in it, and the numbers that it means
Writer = Callable[[str, tuple[int, int]], tuple[dict[str, np.ndarray], np.ndarray] | None]


def write_pair(root: Path, config: dict, write: Writer, dtype: str = "float16") -> dict[str, np.ndarray]:
    """Writes ``root/coded`` and ``root/plain``; returns the tensors of the former.

    config: its ``quantization_config``; nothing is written of an empty one.
    write: function of the name and shape of a projection that returns what is stored; None leaves it plain.
    dtype: dtype of the tensors that stay plain.
    """
    base = hf_tiny.hf_config(moe_intermediate_size=32, dtype=dtype)
    coded, plain = {}, {}
    for name, tensor in hf_tiny.random_tensors(base).items():
        written = write(name.removesuffix(".weight"), tensor.shape) if "_proj." in name else None
        if written is None:
            coded[name], plain[name] = tensor, tensor.astype(np.float32)
        else:
            tensors, plain[name] = written
            coded |= {f"{name.removesuffix('weight')}{part}": array for part, array in tensors.items()}
    stated = {"quantization_config": config} if config else {}
    hf_tiny.write_checkpoint(root / "coded", base | stated, tensors=coded)
    hf_tiny.write_checkpoint(root / "plain", base | {"dtype": "float32"}, tensors=plain)
    return coded


def rewrite(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes other tensors in place of a directory's."""
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def load(directory: Path) -> Decoder:
    """Returns the model in portable form, which rounds no activations."""
    return load_model(
        directory, make_mesh(devices=jax.devices()[:1]), MoEConfig(kernel="xla"), dtype="float32"
    )


@nnx.jit
def _logits(model: Decoder) -> jax.Array:
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(4, 6)
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (4, 6))
    return model.logits(model(Sequences(tokens, positions)).hidden_RND)


def logits(directory: Path) -> np.ndarray:
    """Returns logits that the model of a directory computes in float32."""
    return np.asarray(_logits(load(directory)))


def assert_equal_logits(root: Path) -> None:
    """Asserts that the two models of ``write_pair`` compute the same."""
    got, want = logits(root / "coded"), logits(root / "plain")
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def opened(directory: Path, tensors: dict[str, np.ndarray], name: str = "x") -> HFCheckpoint:
    """Writes the tensors of one module and opens them; use it in a ``with`` statement."""
    directory.mkdir(exist_ok=True)
    save_file({f"{name}.{part}": array for part, array in tensors.items()}, directory / "model.safetensors")
    return HFCheckpoint(directory)
