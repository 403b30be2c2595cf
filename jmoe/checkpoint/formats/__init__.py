"""The formats in which checkpoints store numbers: each has one short file, and one entry here.

The model side names a tensor's format (``Form.number_format``), and a family the methods in which it is read.
"""

from jmoe.checkpoint.formats import mxfp4, plain
from jmoe.checkpoint.formats.format import Format, StoredEntry

FORMATS = {format.name: format for format in (plain.FORMAT, mxfp4.FORMAT)}

__all__ = ["FORMATS", "Format", "StoredEntry"]
