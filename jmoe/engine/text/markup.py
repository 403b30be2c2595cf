"""The marks that stand in an answer's text in the place of special tokens, and the texts around its thoughts.

A special token that the answer's reader needs becomes one private character: the same letters, spelled by
ordinary tokens, stay text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# A call of a function in harmony's channels: mark, name, mark, arguments, mark.
HARMONY_CALL, HARMONY_ARGUMENTS, HARMONY_END = "\ue000", "\ue001", "\ue002"


@dataclass(frozen=True)
class Markup:
    """The marks by which the text of an answer is divided.

    marks: character by id of each token that stands in the text as this character. The model's own text loses
        these characters.
    thought_start, thought_end: texts around thoughts, in which such tokens are already their characters; ""
        if the model writes no thoughts.
    in_thought: whether the answer begins inside of thoughts.
    call_start: text with which the first call begins; "" if the answer calls nothing. Stop strings have no
        effect from there on.
    """

    marks: Mapping[int, str] = field(default_factory=dict)
    thought_start: str = ""
    thought_end: str = ""
    in_thought: bool = False
    call_start: str = ""

    @property
    def has_harmony_calls(self) -> bool:
        """Whether calls in harmony's channels are parts of the text."""
        return HARMONY_END in self.marks.values()

    @property
    def reserved(self) -> frozenset[str]:
        """The characters that only marks add to the text."""
        harmony = (HARMONY_CALL, HARMONY_ARGUMENTS) if self.has_harmony_calls else ()
        return frozenset({*self.marks.values(), *harmony})


PLAIN = Markup()
