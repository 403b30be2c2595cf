"""The formats in which tensors of checkpoints store quantised numbers: each has one short file.

A method of ``jmoe.checkpoint.methods`` reads from ``config.json`` which format a module's weight has.
"""

from jmoe.checkpoint.formats.format import Format, StoredEntry, StoredParam

__all__ = ["Format", "StoredEntry", "StoredParam"]
