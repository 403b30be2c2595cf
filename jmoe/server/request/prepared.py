"""The form in which a request goes to the engine: one engine request for each answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from jmoe.engine.request import Output, Request, SamplingParams
from jmoe.server.request.grammars import AnswerGrammar
from jmoe.server.request.prompts import Prompt
from jmoe.server.request.schema import GenerationRequest
from jmoe.server.request.structured import GrammarRequest


@dataclass(frozen=True)
class PreparedRequest:
    """A checked request whose prompts are tokens.

    body: the checked request body.
    prompts: the request's prompts.
    params: sampling parameters, one set per answer, prompt-major.
    grammar: grammar that the answers must follow, if any.
    prompt_field: body field named in the error if the engine refuses a prompt.
    """

    body: GenerationRequest
    prompts: list[Prompt]
    params: list[SamplingParams]
    grammar: GrammarRequest | None
    prompt_field: str

    @property
    def grammar_field(self) -> str | None:
        """The body field that requests the grammar."""
        return None if self.grammar is None else self.grammar.param

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Returns the same request with other names of the body's fields in errors."""
        grammar = self.grammar
        if grammar is not None:
            grammar = replace(grammar, param=names.get(grammar.param, grammar.param))
        return replace(self, grammar=grammar, prompt_field=names.get(self.prompt_field, self.prompt_field))

    def engine_requests(
        self,
        id: str,
        grammar: AnswerGrammar | None,
        emit: Callable[[int, Output], None],
        arrival_time: float,
    ) -> list[Request]:
        """Makes the engine's request of each answer. It raises a 400 if the grammar cannot be used.

        id: id of the whole answer, which the ids of the requests begin with.
        grammar: the compiled ``grammar``.
        emit: function that takes the number of an answer and its next increment.
        """
        n = len(self.params) // len(self.prompts)
        return [
            Request(
                id=f"{id}-{i}",
                prompt_token_ids=self.prompts[i // n].token_ids,
                params=params,
                emit=partial(emit, i),
                arrival_time=arrival_time,
                constraint=None if grammar is None else grammar.constraint(self.prompts[i // n].markup),
                markup=self.prompts[i // n].markup,
            )
            for i, params in enumerate(self.params)
        ]
