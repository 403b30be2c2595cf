"""The grammar of an answer that may call functions, in any format.

It holds a whole answer: free text up to the format's trigger, then a call whose arguments obey their schema,
any number of times. Thoughts are no part of it: the engine follows it after them.
"""

from collections.abc import Mapping, Sequence

from jmoe.engine.grammar.grammar import Grammar
from jmoe.server.dialects.events import Choice
from jmoe.server.dialects.format import Format
from jmoe.server.dialects.grammars.lark import ANY, Lark
from jmoe.server.dialects.grammars.schemas import Parameters
from jmoe.server.dialects.grammars.values import ArgumentRules
from jmoe.server.dialects.reading.scanner import GAP, Marker, literal_pattern


def calls_grammar(
    form: Format,
    ids: Mapping[str, int],
    functions: Sequence[Parameters],
    choice: Choice,
    *,
    parallel: bool,
    answer: str | None = None,
) -> Grammar:
    """Returns the grammar; raises ValueError if it is too long, or for a rule of a strict function that the
    format cannot express.

    ids: token id of each private character in ``form``.
    parallel: whether an answer may have several calls.
    answer: right side of a Lark rule that derives the text of an answer without calls; None = any text.
    """
    lark = Lark(ids)
    is_many = parallel and choice != "named"
    alternatives = " | ".join(f"call_{i}" for i in range(len(functions)))
    lines = f"calls: {alternatives}\n"
    more = f" ({lark.literal(form.between + form.opens)} calls)*" if is_many and form.is_list else ""
    rest = f"{more} {lark.literal(form.end)}" if form.end else more
    lines += f"body: calls{rest}\n"
    opening = form.begin + form.opens
    if choice != "auto" or answer is not None:
        again = f" ({lark.literal(form.between + opening)} body)*" if is_many and not form.is_list else ""
        start = f"{lark.literal(opening)} body{again}"
        if choice == "auto":
            start, lines = f"{start} | text", f"{lines}text: {answer}\n"
    elif form.is_at_start:
        first, pattern = f"{lark.literal(opening)} calls", Marker(opening).pattern
        if not form.opens:  # only a bracket: the answer is a call if a function's name follows
            # What begins a call is one lexeme, because a longer one of other text would hide it.
            heads = [lark.literal(f"{form.begin}{each.name}{form.named}") for each in functions]
            first = "(" + " | ".join(f"{head} rest_{i}" for i, head in enumerate(heads)) + ")"
            names = "|".join(literal_pattern(each.name) for each in functions)
            pattern = f"{pattern}{GAP}({names}){GAP}{Marker(form.named).pattern}"
        start = f"{first}{rest} | other"
        lines += f"other: OTHER\nOTHER: /{ANY}/ & ~/[ \\t\\r\\n]*{pattern}{ANY}/\n"
    else:
        start = f"(head body){'*' if is_many else '?'} rest"
        trigger = lark.until_trigger(form.trigger)
        lines += f"head: {trigger} {lark.literal(opening[len(form.trigger) :])}\n"
        # After the only call nothing else finds a trigger that is text.
        lines += f"rest: REST\nREST: /{ANY}/{'' if is_many else lark.without(form.trigger)}\n"
    for i, parameters in enumerate(functions):
        lines += call_rules(form, i, parameters, lark)
    return Grammar("lark", f"%llguidance {{}}\nstart: {start}\n{lines}{lark.lines}")


def call_rules(form: Format, i: int, parameters: Parameters, lark: Lark) -> str:
    """Returns the lines of rule ``call_<i>``, which derives a call from the function's name on, and of
    ``rest_<i>``, which derives its arguments and end."""
    rules = ArgumentRules(form, i, parameters, lark)
    number = ' ":" /[0-9]{1,4}/' if form.is_numbered else ""
    name = lark.literal(parameters.name)
    rest = f"rest_{i}: {rules.reference} {lark.literal(form.closes)}\n"
    return f"call_{i}: {name}{number} {lark.literal(form.named)} rest_{i}\n{rest}{rules.lines}"
