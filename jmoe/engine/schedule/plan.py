"""What one step runs, and what it has room for. Pure host code."""

from dataclasses import dataclass, field

from jmoe.engine.request import Request


@dataclass(frozen=True)
class Run:
    """``count`` tokens of a request from position ``start`` on. decodes: whether that is one token behind all
    that are computed, else a part of a prompt; draws: whether the next one is drawn."""

    request: Request
    start: int
    count: int
    decodes: bool
    draws: bool


@dataclass
class Step:
    """One call of the model. size: tokens of prompts a rank, as compiled, 0 without prompts. copies: of pages
    within a rank, (rank, from, to), before it."""

    decodes: list[Run] = field(default_factory=list)
    prompts: list[Run] = field(default_factory=list)
    size: int = 0
    copies: list[tuple[int, int, int]] = field(default_factory=list)

    def copy_rounds(self) -> list[list[tuple[int, int, int]]]:
        """The copies, of each rank at most one a round."""
        rounds: list[list[tuple[int, int, int]]] = []
        for copy in self.copies:
            free = next((r for r in rounds if all(copy[0] != other[0] for other in r)), None)
            if free is None:
                rounds.append(free := [])
            free.append(copy)
        return rounds


@dataclass
class Room:
    """What a step has left for prompts on a rank: tokens, and rows of ``run`` tokens, which a prompt does not
    share with another. used: rows."""

    tokens: int
    rows: int
    run: int
    used: int = 0

    def take(self, wanted: int, page: int) -> int:
        """Tokens of a prompt that has ``wanted`` left: all, or whole pages."""
        most = min(self.tokens, (self.rows - self.used) * self.run)
        count = wanted if wanted <= most else most // page * page
        self.tokens -= count
        self.used += -(-count // self.run)
        return count
