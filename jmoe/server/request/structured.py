"""The grammar that an answer must follow: from ``response_format``, ``structured_outputs`` or the tools."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from jmoe.engine.grammar.grammar import Grammar, one_of, schema_grammar
from jmoe.server.errors import invalid
from jmoe.server.request.bounds import bounded
from jmoe.server.request.schema import (
    GenerationRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    StructuredOutputs,
)
from jmoe.server.request.tools import ToolUse

ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class GrammarRequest:
    """A grammar and the request field that requests it.

    is_free: whether the answer may be any text, beside calls.
    mend: makes another grammar if this one cannot be compiled, from a function that raises ValueError for a
        grammar that cannot; None if there is no other.
    """

    grammar: Grammar
    param: str
    is_free: bool = False
    mend: Callable[[Callable[[Grammar], None]], Grammar] | None = None


def requested_grammar(
    body: GenerationRequest, tools: ToolUse | None = None, around: Callable[[Grammar], Grammar] | None = None
) -> GrammarRequest | None:
    """Returns the requested grammar; None if the answer is free text. It raises a 400 if two fields request
    one, or if another field contradicts it.

    tools: how the answer uses tools. With the choice "auto" a form of the text is that of an answer without
        calls; with another one there is no such answer, and the form has no effect.
    around: makes the grammar of a whole answer from that of its text; None = it is the same.
    """
    makers: dict[str, Callable[[], Grammar]] = {}
    form, outputs = body.response_format, body.structured_outputs
    if isinstance(form, JsonObjectFormat | JsonSchemaFormat):
        makers["response_format"] = partial(_format_grammar, form)
    if outputs is not None:
        makers["structured_outputs"] = partial(_outputs_grammar, outputs)
    if not makers and tools is None:
        return None
    param, *others = [*makers, "tools"]
    if len(makers) == 2:
        raise invalid(f"{param} and {others[0]} both say what the answer must be; give one", others[0])
    is_open = not makers and tools is not None and tools.choice == "auto"
    for field in ("ignore_eos", "min_tokens"):
        if getattr(body, field) and not is_open:
            raise invalid(f"{field} contradicts {param}, which says where the answer ends", field)
    try:
        text = makers[param]() if makers else None
        if tools is None:
            assert text is not None
            return GrammarRequest(text if around is None else around(text), param)
        joined = replace(tools, answer=text)
        grammar = joined.grammar()
    except ValueError as error:
        raise invalid(f"{param} cannot be used: {error}", param) from None
    return None if grammar is None else GrammarRequest(grammar, "tools", is_open, joined.mended)


def _format_grammar(form: JsonObjectFormat | JsonSchemaFormat) -> Grammar:
    schema = bounded(form.json_schema.schema) if isinstance(form, JsonSchemaFormat) else ANY_OBJECT
    return schema_grammar(schema)


def _outputs_grammar(outputs: StructuredOutputs) -> Grammar:
    values = {name: getattr(outputs, name) for name in outputs.__struct_fields__}
    named = [name for name, value in values.items() if value not in (None, False)]
    if len(named) != 1:
        fields = ", ".join(values)
        raise invalid(f"structured_outputs must have exactly one of {fields}", "structured_outputs")
    if isinstance(outputs.json, str):
        return Grammar("json_schema", outputs.json)
    if outputs.json is not None:
        return schema_grammar(bounded(outputs.json))
    if outputs.regex is not None:
        return Grammar("regex", outputs.regex)
    if outputs.choice is not None:
        return one_of(bounded(outputs.choice))
    if outputs.grammar is not None:
        return Grammar("lark", outputs.grammar)
    return schema_grammar(ANY_OBJECT)
