"""Decides for how long a request keeps its masks after its grammar has refused a token.

While an answer may be free text, its tokens are drawn without a mask. A grammar that refuses much of what the
model wants, such as one of digits alone, would then draw most tokens twice.
"""

LONGEST = 64  # tokens with a mask after a refusal
FREE = 4  # tokens without a refusal, for each token of the last masks, after which it counts as a single one


class Caution:
    """The caution of one answer. Refusals that follow one another closely double the number of masked tokens.

    num_masked: tokens that are still drawn with a mask, whatever the grammar says.
    """

    __slots__ = ("_length", "_num_free", "num_masked")

    def __init__(self) -> None:
        self.num_masked = self._length = self._num_free = 0

    def refuse(self) -> None:
        """Notes that a token was refused, which was drawn without a mask."""
        is_close = self._num_free < FREE * self._length
        self._length = min(2 * self._length, LONGEST) if is_close else 1
        self.num_masked, self._num_free = self._length, 0

    def accept(self) -> None:
        """Notes that a token was accepted."""
        if self.num_masked:
            self.num_masked -= 1
        else:
            self._num_free += 1
