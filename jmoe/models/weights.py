"""Where a checkpoint keeps a parameter's values, and in which form."""

from dataclasses import dataclass
from typing import Literal

# How a stored tensor's values lie, against the parameter's own [..., out, in]:
#   plain        the same
#   halves       [2 F, D] for a gate-and-up slice [2, F, D]: all gate rows, then all up rows
#   alternate    the same, gate and up rows in turn (gpt-oss)
Rows = Literal["plain", "halves", "alternate"]


@dataclass(frozen=True)
class Form:
    """rows: of a gate-and-up tensor. transposed: stored ``[in, out]``. format: the name of the one
    of ``jmoe.checkpoint.formats`` in which its numbers are kept."""

    rows: Rows = "plain"
    transposed: bool = False
    format: str = "plain"


PLAIN = Form()


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint and the slice of a parameter that it fills.

    name: in the checkpoint, before what the format adds to it.
    path: of the parameter.
    index: into the parameter's leading axes.
    part: the entry of the tensor's leading axis that is meant, where it holds those of all experts; None is
        all of it.
    form: how the values lie and in which format they are kept.
    """

    name: str
    path: str
    index: tuple[int, ...] = ()
    part: int | None = None
    form: Form = PLAIN
