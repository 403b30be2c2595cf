"""Prompts of completions cut to a number of tokens, as ``truncate_prompt_tokens`` requests."""

from dataclasses import dataclass, replace

from jmoe.engine.request import SamplingParams
from jmoe.server.errors import invalid
from jmoe.server.request.bounds import MAX_TOKENIZED
from jmoe.server.request.prompts import Prompt, TextEncoder, completion_prompts, prompt_of_ids
from jmoe.server.request.schema import CompletionRequest

FIELD = "truncate_prompt_tokens"


@dataclass(frozen=True)
class Truncation:
    """count: most tokens of a prompt.
    keeps_end: whether a longer prompt keeps its last tokens; if not, its first.
    """

    count: int
    keeps_end: bool

    def cut(self, ids: list[int]) -> list[int]:
        return ids[-self.count :] if self.keeps_end else ids[: self.count]


def truncation(body: CompletionRequest, params: SamplingParams, max_model_len: int) -> Truncation | None:
    """Returns how the prompts are cut, or None if they are not. It raises a 400 for 0 tokens.

    params: sampling parameters of the answers, which leave room for their tokens.
    """
    if body.truncate_prompt_tokens is None:
        return None
    if body.truncate_prompt_tokens == 0:
        raise invalid(f"{FIELD} must be at least 1, or -1 for as many as fit", FIELD)
    new = 1 if params.max_tokens is None else params.max_tokens
    fits = body.truncate_prompt_tokens == -1
    return Truncation(
        max(max_model_len - new, 1) if fits else body.truncate_prompt_tokens, body.truncation_side != "right"
    )


def cut_prompts(body: CompletionRequest, encoder: TextEncoder, cut: Truncation | None) -> list[Prompt]:
    """Returns the prompts of a completion, cut if ``cut`` is given."""
    echo = bool(body.echo)
    if cut is None:
        return completion_prompts(body.prompt, encoder, echo=echo)
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    characters = sum(len(text) for text in texts if isinstance(text, str))
    if characters > MAX_TOKENIZED:  # the context does not bound what is tokenized
        raise invalid(
            f"prompt has {characters} characters; the limit is {MAX_TOKENIZED} with {FIELD}", "prompt"
        )
    prompts = completion_prompts(body.prompt, replace(encoder, limit=None), echo=echo)
    return [
        prompt
        if len(prompt.token_ids) <= cut.count
        else prompt_of_ids(cut.cut(prompt.token_ids), encoder.codec, echo)
        for prompt in prompts
    ]
