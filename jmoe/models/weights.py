"""The source of a parameter's values in a checkpoint: the tensors, and the form of each."""

from dataclasses import dataclass
from typing import Any, Literal

# The row layout of a stored tensor, compared with the parameter's own layout [..., out, in]:
#   plain        the same layout
#   halves       [2 F, D] for a gate-and-up slice [2, F, D]: all gate rows, then all up rows
#   alternate    [2 F, D] too, with gate and up rows in turn (gpt-oss)
RowLayout = Literal["plain", "halves", "alternate"]


@dataclass(frozen=True)
class Form:
    """The order in which a tensor stores its numbers; their format is the checkpoint's.

    row_layout: row layout of a gate-and-up tensor.
    is_transposed: whether it is stored as ``[in, out]``.
    halved_heads: number of heads whose rows are stored with the two halves of a head in turn (row 0 of the
        first half, row 0 of the second, row 1 of the first ...), as llama.cpp rotates them; 0 for rows in
        their own order.
    """

    row_layout: RowLayout = "plain"
    is_transposed: bool = False
    halved_heads: int = 0


PLAIN = Form()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint and the slice of a parameter that it fills.

    name: name of the tensor in the checkpoint, without what the format adds to it.
    path: path of the parameter in the decoder.
    index: index into the parameter's leading axes.
    expert: index into the tensor's leading axis if the tensor holds all experts; None is the whole tensor.
    form: order of the values.
    rows: the first row that it fills of the slice at ``index``, and the row after the last; None is all rows.
    """

    name: str
    path: str
    index: tuple[int, ...] = ()
    expert: int | None = None
    form: Form = PLAIN
    rows: tuple[int, int] | None = None

    def part_of(self, parameter: Any) -> Any:
        """Returns the view of a parameter that the tensor fills."""
        index = self.index if self.rows is None else (*self.index, slice(*self.rows))
        return parameter[index]

    def part_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of that view of a parameter of ``shape``."""
        _, *inner = shape = shape[len(self.index) :]
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *inner)
