"""The markers of a format that are single tokens, as private characters in the text of an answer.

The engine's text layer writes the character for the token (``Markup.marks``), and the format has it in the
marker's place. So the same letters spelled by ordinary tokens stay text, no marker is ever cut, and reader
and grammar agree on what a marker is.
"""

from collections.abc import Mapping

from tokenizers import Tokenizer

from jmoe.engine.grammar.tokens import is_apart
from jmoe.server.dialects.format import Format

FIRST = 0xE010  # private characters below it are harmony's, and those of thoughts


def apart_tokens(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """Returns the ids, by name, of the tokens that a grammar must name by number.

    vocab_size: vocabulary size of the model.
    """
    added = tokenizer.get_added_tokens_decoder()
    return {
        token.content: id
        for id, token in added.items()
        if id < vocab_size and is_apart(token.content, is_special=token.special)
    }


def marked(form: Format, tokens: Mapping[str, int]) -> tuple[Format, dict[int, str]]:
    """Returns the format with private characters in place of markers that are tokens, and these characters by
    id.

    tokens: result of ``apart_tokens``.
    """
    texts = "\0".join(form.texts)
    found = sorted((name for name in tokens if name in texts), key=len, reverse=True)
    marks = {name: chr(FIRST + i) for i, name in enumerate(found)}
    for name, mark in marks.items():
        texts = texts.replace(name, mark)
    used = {tokens[name]: mark for name, mark in marks.items() if mark in texts}
    return form.with_texts(tuple(texts.split("\0"))), used
