"""The plan of one step, and its budget for prompts. Pure host code."""

from dataclasses import dataclass, field

from jmoe.engine.request import Request


@dataclass(frozen=True)
class Run:
    """``count`` tokens of a request from position ``start`` on, which one step runs.

    is_decode: whether this is one decoded token after all computed ones; otherwise it is a part of a prompt.
    is_sampled: whether the next token is sampled.
    is_masked: whether it is sampled among the tokens that the request's grammar allows.
    is_redraw: whether the token was computed before, and the token drawn after it was refused. The device has
        since run the refused token for the request's seat.
    """

    request: Request
    start: int
    count: int
    is_decode: bool
    is_sampled: bool
    is_masked: bool = False
    is_redraw: bool = False


@dataclass
class Step:
    """One call of the model.

    decodes: runs of one decoded token each.
    prompts: runs of prompt tokens.
    prompt_size: compiled number of prompt tokens per rank; 0 without prompts.
    copies: copies of pages within a rank before the call, as (rank, from, to).
    """

    decodes: list[Run] = field(default_factory=list)
    prompts: list[Run] = field(default_factory=list)
    prompt_size: int = 0
    copies: list[tuple[int, int, int]] = field(default_factory=list)

    def copy_rounds(self) -> list[list[tuple[int, int, int]]]:
        """Returns the copies in rounds; a round has at most one copy of each rank."""
        rounds: list[list[tuple[int, int, int]]] = []
        for copy in self.copies:
            free = next((r for r in rounds if all(copy[0] != other[0] for other in r)), None)
            if free is None:
                rounds.append(free := [])
            free.append(copy)
        return rounds


@dataclass
class PromptBudget:
    """The room for prompts that a step still has on a rank.

    num_tokens: tokens that are left of the budget.
    num_rows: rows of the step; two prompts never share a row.
    row_tokens: tokens of a row.
    num_used_rows: rows that are already used.
    """

    num_tokens: int
    num_rows: int
    row_tokens: int
    num_used_rows: int = 0

    def take(self, wanted: int, page: int) -> int:
        """Takes room for a prompt with ``wanted`` tokens left: for all of them, or for as many whole pages as
        fit."""
        most = min(self.num_tokens, (self.num_rows - self.num_used_rows) * self.row_tokens)
        count = wanted if wanted <= most else most // page * page
        self.num_tokens -= count
        self.num_used_rows += -(-count // self.row_tokens)
        return count
