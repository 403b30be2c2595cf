"""Finds the texts that a model's template writes around thoughts, and the variables that switch them.

A model of harmony's channels (gpt-oss) has no such texts: the engine separates its thoughts by their channel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jmoe.server.template.probe import ANSWER, QUESTION, Probe

AROUND = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
SWITCHES = ("enable_thinking", "thinking")
EFFORT = "reasoning_effort"
EFFORTS = ("low", "high")
# The words of OpenAI's and other APIs, as the three that templates know.
LEVELS = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}


@dataclass(frozen=True)
class Thinking:
    """The thoughts of a model, as its template has them.

    start, end: texts around thoughts; "" if the template knows none.
    switch: variable of the template that switches thoughts on and off; None if there is none.
    has_effort: whether the template reads the variable ``reasoning_effort``.
    """

    start: str = ""
    end: str = ""
    switch: str | None = None
    has_effort: bool = False

    def __str__(self) -> str:
        around = f"between {self.start!r} and {self.end!r}" if self.start else "none in the template"
        names = [name for name in (self.switch, EFFORT if self.has_effort else None) if name]
        return around + (f", set by {' and '.join(names)}" if names else "")

    def variables(self, is_on: bool | None, effort: str | None) -> dict[str, Any]:
        """Returns the variables of the template that request thoughts, as far as it has such variables.

        is_on: whether the model thinks; None leaves it to ``effort``.
        effort: how much it thinks, one of ``LEVELS``; None leaves it to the template.
        """
        made: dict[str, Any] = {}
        is_on = effort != "none" if is_on is None and effort is not None else is_on
        if self.switch is not None and is_on is not None:
            made[self.switch] = is_on
        if self.has_effort and effort is not None:
            made[EFFORT] = LEVELS[effort]
        return made

    def is_inside(self, prompt: str, begun: str = "") -> bool:
        """Returns whether an answer to ``prompt`` begins inside of thoughts: the prompt's last text, white
        space aside, opens them.

        begun: beginning of the answer, at the prompt's end, which may open or close thoughts itself.
        """
        if not self.start:
            return False
        if self.start in begun or self.end in begun:
            return begun.rfind(self.start) > begun.rfind(self.end)
        return prompt.rstrip().removesuffix(begun.strip()).rstrip().endswith(self.start)


def find_thinking(probe: Probe, source: str) -> Thinking:
    """Finds the thoughts by rendering a question.

    source: the template's own text.
    """
    plain = probe([QUESTION])
    switch = next((name for name in SWITCHES if _changes(probe, name, (True, False))), None)
    around = _around(probe, source, {} if switch is None else {switch: True}, plain or "")
    return Thinking(*around, switch=switch, has_effort=_changes(probe, EFFORT, EFFORTS))


def _changes(probe: Probe, name: str, values: tuple[Any, Any]) -> bool:
    """Returns whether the prompt depends on the variable."""
    first, second = (probe([QUESTION], variables={name: value}) for value in values)
    return first is not None and second is not None and first != second


def _around(probe: Probe, source: str, on: Mapping[str, Any], plain: str) -> tuple[str, str]:
    """Returns the texts around thoughts that the template names, or writes: it may put them together."""
    thoughts = ANSWER | {"reasoning_content": "jmoe_thought", "thinking": "jmoe_thought"}
    shown = [source, plain, probe([QUESTION], variables=on), probe([QUESTION, thoughts])]
    for start, end in AROUND:
        if any(text and (start in text or end in text) for text in shown):
            return start, end
    return "", ""
