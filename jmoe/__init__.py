"""Serves Mixture-of-Experts language models in JAX.

So far it has been measured on CPUs only. The kernels for TPUs and GPUs compile and pass their tests in an
interpreter; they have not run on a device yet.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jmoe.checkpoint import convert
    from jmoe.checkpoint import load_model as load
    from jmoe.config.model import ModelConfig
    from jmoe.config.moe import MoEConfig
    from jmoe.engine.grammar.grammar import Grammar
    from jmoe.engine.llm import LLM
    from jmoe.engine.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Grammar", "MoEConfig", "ModelConfig", "SamplingParams", "convert", "load"]

_HOME = {
    "LLM": ("jmoe.engine.llm", "LLM"),
    "Grammar": ("jmoe.engine.grammar.grammar", "Grammar"),
    "SamplingParams": ("jmoe.engine.request", "SamplingParams"),
    "ModelConfig": ("jmoe.config.model", "ModelConfig"),
    "MoEConfig": ("jmoe.config.moe", "MoEConfig"),
    "load": ("jmoe.checkpoint", "load_model"),
    "convert": ("jmoe.checkpoint", "convert"),
}


def __getattr__(name: str) -> Any:
    """Loads a public name on first use, so that ``jmoe --help`` does not import jax."""
    if name not in _HOME:
        raise AttributeError(f"module 'jmoe' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)
