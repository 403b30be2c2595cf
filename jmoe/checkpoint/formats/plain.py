"""Unquantised numbers, in one tensor of any floating-point dtype."""

from jmoe.checkpoint.formats.format import Format, StoredEntry
from jmoe.checkpoint.hf_reader import HFCheckpoint
from jmoe.checkpoint.safetensors_file import DTYPES


def entries(name: str, shape: tuple[int, ...]) -> tuple[StoredEntry, ...]:
    return (StoredEntry(name, shape, tuple(DTYPES)),)


FORMAT = Format("plain", ("",), entries, HFCheckpoint.read_run)
