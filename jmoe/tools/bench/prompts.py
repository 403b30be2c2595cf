"""Prompts of a given length: token ids or words, drawn with a seed; equal blocks have equal tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jmoe.tools.bench.loads import LoadCall

COMMON = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but "
    "what all were when we there can an your which their said if do will each about how up out them then she"
)
SHARED, OWN = 0, 1  # streams of random numbers: blocks by number, prompts by request


@dataclass(frozen=True)
class PromptSource:
    """The material of which prompts are made.

    units: token ids or words.
    is_text: whether prompts are consecutive units, because these are a text; otherwise units are drawn one by
        one.
    seed: seed of the random draws.
    """

    units: Sequence[int] | Sequence[str]
    is_text: bool
    seed: int

    def draw(self, stream: int, number: int, length: int) -> list:
        """Draws ``length`` units, the same ones for the same ``stream`` and ``number``."""
        rng, units = np.random.default_rng([self.seed, stream, number]), self.units
        if self.is_text:
            start = int(rng.integers(len(units)))
            return [units[(start + i) % len(units)] for i in range(length)]
        return [units[i] for i in rng.integers(len(units), size=length)]

    def prompt(self, number: int, call: LoadCall, block: int) -> list:
        """Returns the prompt of request ``number``; calls with the same first blocks share their units."""
        if not call.blocks:
            return self.draw(OWN, number, call.input_length)
        units: list = []
        for one in call.blocks:
            if len(units) >= call.input_length:
                break
            units += self.draw(SHARED, one, block)
        return units[: call.input_length]
