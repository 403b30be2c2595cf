"""Which grammar a request's answer must follow: ``response_format``, ``structured_outputs`` or its tools."""

from dataclasses import dataclass

from jmoe.engine.grammar.grammar import Grammar, one_of, schema_grammar
from jmoe.server.errors import invalid
from jmoe.server.request.bounds import bounded
from jmoe.server.request.schema import (
    ChatRequest,
    GenerationRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    StructuredOutputs,
)
from jmoe.server.request.tools import forced_tools, tools_grammar

ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Wanted:
    """A grammar and the request field that requested it."""

    grammar: Grammar
    param: str


def wanted_grammar(body: GenerationRequest) -> Wanted | None:
    """The requested grammar; None if the answer is free text. 400 if two fields request one, or if another
    field contradicts it."""
    constrained = isinstance(body.response_format, JsonObjectFormat | JsonSchemaFormat)
    makers = {
        "response_format": _of_format if constrained else None,
        "structured_outputs": _of_outputs if body.structured_outputs is not None else None,
        "tools": _of_tools if isinstance(body, ChatRequest) and forced_tools(body) else None,
    }
    asked = [(param, make) for param, make in makers.items() if make is not None]
    if not asked:
        return None
    param, make = asked[0]
    if len(asked) > 1:
        raise invalid(f"{param} and {asked[1][0]} both say what the answer must be; give one", asked[1][0])
    for field in ("ignore_eos", "min_tokens"):
        if getattr(body, field):
            raise invalid(f"{field} contradicts {param}, which says where the answer ends", field)
    try:
        return Wanted(make(body), param)
    except ValueError as error:
        raise invalid(f"{param} cannot be used: {error}", param) from None


def _of_format(body: GenerationRequest) -> Grammar:
    form = body.response_format
    return schema_grammar(
        bounded(form.json_schema.schema) if isinstance(form, JsonSchemaFormat) else ANY_OBJECT
    )


def _of_outputs(body: GenerationRequest) -> Grammar:
    given = body.structured_outputs or StructuredOutputs()
    values = {name: getattr(given, name) for name in given.__struct_fields__}
    named = [name for name, value in values.items() if value not in (None, False)]
    if len(named) != 1:
        fields = ", ".join(values)
        raise invalid(f"structured_outputs must have exactly one of {fields}", "structured_outputs")
    if isinstance(given.json, str):
        return Grammar("json_schema", given.json)
    if given.json is not None:
        return schema_grammar(bounded(given.json))
    if given.regex is not None:
        return Grammar("regex", given.regex)
    if given.choice is not None:
        return one_of(bounded(given.choice))
    if given.grammar is not None:
        return Grammar("lark", given.grammar)
    return schema_grammar(ANY_OBJECT)


def _of_tools(body: GenerationRequest) -> Grammar:
    assert isinstance(body, ChatRequest)
    return tools_grammar(body)
