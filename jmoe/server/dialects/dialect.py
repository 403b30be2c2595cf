"""The dialect of a model: the form of its calls over its own tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from jmoe.engine.grammar.grammar import Grammar, lark_rule
from jmoe.engine.text.markup import HARMONY_END
from jmoe.server.dialects.events import Choice, Function, Reader
from jmoe.server.dialects.format import Format
from jmoe.server.dialects.formats import FORMATS
from jmoe.server.dialects.grammars.calls import calls_grammar
from jmoe.server.dialects.grammars.harmony import harmony_grammar
from jmoe.server.dialects.grammars.schemas import Followed
from jmoe.server.dialects.ids import new_id
from jmoe.server.dialects.marks import apart_tokens, marked
from jmoe.server.dialects.reader import FormatReader
from jmoe.server.dialects.rules import AnswerRules


class Dialect(Protocol):
    """A form in which a model writes calls.

    name: its name.
    choices: kinds of ``tool_choice`` that it serves.
    marks: private characters, by id, of tokens that stand in the text as these (``Markup.marks``).
    call_start: text with which a call in free text begins, in these characters; "" = stop strings have an
        effect in calls too (``Markup.call_start``).
    followed: makes the schemas of functions ready for its grammars.

    grammar: returns the grammar of a whole answer after its thoughts, None if it is free text. Raises
        ValueError for functions that no grammar can follow, or that the dialect cannot join with a form of
        the text.
    around: returns the grammar of a whole answer after its thoughts whose text follows a grammar.
    reader: makes the reader of one answer.
    new_id: returns an id for a call of ``name``, the conversation's call ``number`` (from 0), in the form
        that the model knows.
    """

    @property
    def name(self) -> str: ...
    @property
    def choices(self) -> frozenset[Choice]: ...
    @property
    def marks(self) -> Mapping[int, str]: ...
    @property
    def call_start(self) -> str: ...
    @property
    def followed(self) -> Followed: ...

    def grammar(self, rules: AnswerRules) -> Grammar | None: ...
    def around(self, answer: Grammar) -> Grammar: ...
    def reader(self, choice: Choice, functions: Sequence[Function]) -> Reader: ...
    def new_id(self, name: str, number: int) -> str: ...


class FormatDialect:
    """A format over one tokenizer (``Dialect``).

    form: the format as it is declared.
    tokens: result of ``marks.apart_tokens``.
    """

    choices = frozenset[Choice](("auto", "required", "named"))

    def __init__(self, form: Format, tokens: Mapping[str, int]):
        self.form, self.tokens = form, tokens
        self.is_harmony = form == FORMATS["harmony"]
        self.marked, self.marks = marked(form, tokens)
        if self.is_harmony and (call := tokens.get("<|call|>")) is not None:
            self.marks[call] = HARMONY_END  # the text layer marks calls in channels where it knows this mark
        self.followed = Followed()

    @property
    def name(self) -> str:
        return self.form.name

    @property
    def call_start(self) -> str:
        is_bracket = self.form.is_at_start and not self.form.opens  # which a text may hold too
        return "" if is_bracket else self.marked.trigger

    def grammar(self, rules: AnswerRules) -> Grammar | None:
        parameters = [self.followed.parameters(each, rules.open_names) for each in rules.functions]
        text = None if rules.answer is None else lark_rule(rules.answer)
        if self.is_harmony:
            return harmony_grammar(self.tokens, parameters, rules.choice, text)
        if text is not None and self.form.is_at_start:
            raise ValueError(
                f"a call of {self.name!r} may begin as a text does, so the text can have no form"
            )
        ids = {mark: id for id, mark in self.marks.items()}
        kind = {"parallel": rules.is_parallel, "answer": text}
        return calls_grammar(self.marked, ids, parameters, rules.choice, **kind)

    def around(self, answer: Grammar) -> Grammar:
        """Returns the grammar itself, or with harmony's channels around it; Lark stays as it is given."""
        if not self.is_harmony or answer.kind == "lark":
            return answer
        return harmony_grammar(self.tokens, (), "auto", lark_rule(answer))

    def reader(self, choice: Choice, functions: Sequence[Function]) -> Reader:
        return FormatReader(self.marked, functions)

    def new_id(self, name: str, number: int) -> str:
        return new_id(self.form.ids, name, number)


def format_dialect(form: Format, tokenizer: Tokenizer, vocab_size: int) -> FormatDialect:
    """Returns the dialect of a format over a model's tokenizer.

    vocab_size: vocabulary size of the model.
    """
    return FormatDialect(form, apart_tokens(tokenizer, vocab_size))
