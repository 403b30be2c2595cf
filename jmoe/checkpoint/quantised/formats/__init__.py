"""The formats in which tensors of checkpoints store quantised numbers: each has one short file.

A method (``quantised.methods``) reads from ``config.json`` which format the weight of a module has.
"""

from jmoe.checkpoint.quantised.formats.format import Format, StoredEntry, StoredParam

__all__ = ["Format", "StoredEntry", "StoredParam"]
