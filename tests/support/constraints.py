"""Constraints of answers for tests: pseudo-random sets of tokens, refusals at known places, masks at each."""

import zlib
from abc import ABC, abstractmethod

import numpy as np

from jmoe.engine.request import Constraint


class AlwaysMasked:
    """The same constraint with a mask for every token: the oracle of answers drawn without masks."""

    is_open = False

    def __init__(self, constraint: Constraint):
        self.constraint = constraint
        self.allowed, self.accept = constraint.allowed, constraint.accept
        self.is_allowed = constraint.is_allowed


class Counted:
    """The same constraint, with the number of its masks and the tokens that it accepted."""

    def __init__(self, constraint: Constraint):
        self.constraint, self.num_masks, self.taken = constraint, 0, []
        self.is_allowed = constraint.is_allowed

    @property
    def is_open(self) -> bool:
        return self.constraint.is_open

    def allowed(self) -> np.ndarray:
        self.num_masks += 1
        return self.constraint.allowed()

    def accept(self, token_id: int) -> None:
        self.taken.append(token_id)
        self.constraint.accept(token_id)


class Sets(ABC):
    """Each set of allowed tokens follows from the tokens before it. A subclass says which (``_set``).

    vocab_size: size of the vocabulary.
    """

    is_open = True

    def __init__(self, vocab_size: int):
        self.vocab_size, self.taken = vocab_size, []
        self._bits = self._set()

    @abstractmethod
    def _set(self) -> np.ndarray:
        """Returns which tokens may come next, bool ``[V]``."""

    def allowed(self) -> np.ndarray:
        padded = np.zeros(-(-self.vocab_size // 32) * 32, bool)
        padded[: self.vocab_size] = self._bits
        return np.packbits(padded, bitorder="little").view(np.uint32)

    def is_allowed(self, token_id: int) -> bool:
        return bool(self._bits[token_id])

    def accept(self, token_id: int) -> None:
        if not self._bits[token_id]:
            raise ValueError(f"token {token_id} is not allowed")
        self.taken.append(token_id)
        self._bits = self._set()


class RandomSets(Sets):
    """Most tokens are allowed in open places, a few in closed ones, which are a third of all.

    seed: seed of the sets.
    """

    def __init__(self, vocab_size: int, seed: int):
        self.seed = seed
        super().__init__(vocab_size)

    def _set(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, zlib.crc32(np.array(self.taken, np.int32).tobytes())])
        self.is_open = bool(rng.random() < 2 / 3)
        bits = rng.random(self.vocab_size) < (0.7 if self.is_open else 0.1)
        bits[rng.integers(self.vocab_size)] = True
        return bits


class Refuses(Sets):
    """Everything is allowed except for these tokens.

    refused: refused tokens by their index in the answer.
    """

    def __init__(self, vocab_size: int, refused: dict[int, list[int]]):
        self.refused = refused
        super().__init__(vocab_size)

    def _set(self) -> np.ndarray:
        bits = np.ones(self.vocab_size, bool)
        bits[self.refused.get(len(self.taken), [])] = False
        return bits
