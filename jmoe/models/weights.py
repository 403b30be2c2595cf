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
    """rows: of a gate-and-up tensor. transposed: stored ``[in, out]``. mxfp4: blocks of 32 four-bit numbers
    with one scale, in two tensors, ``name_blocks`` and ``name_scales``."""

    rows: Rows = "plain"
    transposed: bool = False
    mxfp4: bool = False


PLAIN = Form()


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint and the slice of a parameter that it fills.

    name: in the checkpoint. path: of the parameter. index: into the parameter's leading axes. part: the entry
    of the tensor's leading axis that is meant, where it holds those of all experts; None is all of it.
    """

    name: str
    path: str
    index: tuple[int, ...] = ()
    part: int | None = None
    form: Form = PLAIN

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names as the checkpoint has them."""
        return (f"{self.name}_blocks", f"{self.name}_scales") if self.form.mxfp4 else (self.name,)
