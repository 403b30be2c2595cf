"""Checkpoints: Hugging Face directories, read and written, and converted (Orbax) ones."""

from jmoe.checkpoint.converted.convert import convert
from jmoe.checkpoint.hf.writer import save_hf
from jmoe.checkpoint.load import load_model, read_config

__all__ = ["convert", "load_model", "read_config", "save_hf"]
