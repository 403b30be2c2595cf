"""The grammar of gpt-oss' answers: messages in channels, of which the last is a call or the final text.

Unlike others it holds the thoughts too, because a message's channel is known only after its marker.
"""

import json
from collections.abc import Mapping, Sequence

from jmoe.engine.grammar.grammar import Grammar
from jmoe.server.dialects.events import Choice
from jmoe.server.dialects.grammars.lark import ANY
from jmoe.server.dialects.grammars.schemas import Parameters

NAMES = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>")


def harmony_grammar(
    tokens: Mapping[str, int], functions: Sequence[Parameters], choice: Choice, answer: str | None = None
) -> Grammar:
    """Returns the grammar of an answer with at most one call, which ends it. Raises ValueError if the
    tokenizer lacks one of harmony's markers, or if the grammar is too long.

    tokens: ids of the tokenizer's markers by name.
    answer: right side of a Lark rule that derives the final text; None = any text.
    """
    missing = [name for name in NAMES if name not in tokens]
    if missing:
        raise ValueError(f"the tokenizer has no token {missing[0]}, which calls in harmony need")
    begin, channel, message, end, constrain = (f"<[{tokens[name]}]>" for name in NAMES)
    calls = " | ".join(f"call_{i}" for i in range(len(functions)))
    is_free = choice == "auto"
    asides = '("analysis" | "commentary")' if is_free else '"analysis"'
    last = ("(final | call)" if functions else "final") if is_free else "call"
    lines = [
        "%llguidance {}",
        f'start: ({begin} "assistant")? (aside {begin} "assistant")* {last}',
        f"aside: {channel} {asides} {message} TEXT {end}",
        f'final: {channel} "final" {message} text',
        "text: TEXT" if answer is None else f"text: {answer}",
        *([f"call: {calls}"] if functions else []),
        f'form: " "? {constrain} "json" | " json"',
        f"TEXT: /{ANY}/",
    ]
    for i, parameters in enumerate(functions):
        to = json.dumps(f" to=functions.{parameters.name}")
        header = f'({to} {channel} "commentary" | {channel} "commentary" {to})'
        lines.append(f"call_{i}: {header} form {message} args_{i}")
        lines.append(f"args_{i}: %json {parameters.json()}")
    return Grammar("lark", "\n".join(lines) + "\n", has_inner_text=True)
