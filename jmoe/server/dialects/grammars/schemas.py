"""The schemas of functions as grammars follow them: strictly, or leniently if the client does not ask for it.

Under ``strict: true`` a schema is followed exactly or refused. Else what llguidance does not implement is
left out, and a schema that cannot be followed at all becomes "any object".
"""

import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from jmoe.engine.grammar.check import TooCostly
from jmoe.engine.grammar.grammar import MAX_GRAMMAR_BYTES, WHITESPACE, Grammar
from jmoe.engine.grammar.json_schema import prepared
from jmoe.engine.grammar.schema_keywords import each_part
from jmoe.server.dialects.events import Function

log = logging.getLogger(__name__)

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_OBJECT = {"type": "object"}
# Keywords that say nothing about validity.
ANNOTATIONS = {
    *("title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"),
}
# Keywords that llguidance does not implement.
UNFOLLOWED = {
    *("propertyNames", "uniqueItems", "contains", "minContains", "maxContains", "not", "if"),
    *("dependentRequired", "dependentSchemas", "dependencies"),
    *("unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
}


@dataclass(frozen=True)
class Parameters:
    """The schema of a function's arguments, ready for a grammar.

    name: the function's.
    schema: schema of an object, in the form that llguidance follows.
    is_strict: whether every keyword must be followed.
    """

    name: str
    schema: dict[str, Any]
    is_strict: bool

    def json(self, schema: dict[str, Any] | None = None) -> str:
        """Returns the text of ``%json`` for ``schema``, which is a part of this one; by default all of it."""
        part = self.schema if schema is None else schema
        options: dict[str, Any] = {"whitespace_pattern": WHITESPACE}
        if not self.is_strict:
            options["lenient"] = True
        text = json.dumps(part, ensure_ascii=False)
        if schema is not None and '"$ref"' in text:
            names = ("$defs", "definitions")
            part = {name: self.schema[name] for name in names if name in self.schema} | part
        return json.dumps({"x-guidance": options} | part, ensure_ascii=False)

    def leave_out(self, what: str) -> None:
        """Leaves a rule out of the grammar; under ``strict`` it raises ValueError instead."""
        if self.is_strict:
            raise ValueError(f"{self.name!r} is strict, but {what}")


class Followed:
    """Makes the schemas of one server's requests ready. It tells each keyword that is left out once."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def parameters(self, function: Function, open_names: Collection[str] = ()) -> Parameters:
        """Returns a function's parameters; raises ValueError that names the function if they cannot be
        followed.

        open_names: functions whose arguments are any object.
        """
        name, is_strict = function.name, function.strict is True
        if name in open_names and not is_strict:
            return Parameters(name, ANY_OBJECT, is_strict)
        given = NO_ARGUMENTS if function.parameters is None else function.parameters
        try:
            text = json.dumps({"type": "object"} | slim(given), ensure_ascii=False, allow_nan=False)
            if len(text) > MAX_GRAMMAR_BYTES:
                raise ValueError(f"they have {len(text)} characters; the limit is {MAX_GRAMMAR_BYTES}")
            schema = json.loads(prepared(text))
            if schema.get("type", "object") != "object":
                raise ValueError("they must have the type 'object'")
        except (ValueError, RecursionError) as error:
            reason = "they are nested too deeply" if isinstance(error, RecursionError) else str(error)
            if is_strict or function.parameters is None or _is_no_object(given):
                raise ValueError(f"the parameters of {name!r}: {reason}") from None
            self._tell(f"the parameters of {name!r} are any object: {reason}", name)
            return Parameters(name, ANY_OBJECT, is_strict)
        if not is_strict:
            for keyword in sorted(keywords(schema) & UNFOLLOWED):
                self._tell(f"{keyword} in tools is not followed unless strict is true", keyword)
        return Parameters(name, schema, is_strict)

    def _tell(self, text: str, key: str) -> None:
        if key not in self.told and len(self.told) < 1000:
            self.told.add(key)
            log.info(text)

    def mended(
        self,
        make: Callable[[Collection[str]], Grammar],
        functions: Sequence[Function],
        check: Callable[[Grammar], None],
    ) -> Grammar:
        """Returns a grammar that ``check`` accepts although that of the schemas as they are was refused.

        Functions that are not strict and whose own schema is refused take any object. Raises ValueError, with
        the name of a strict function whose schema is refused.

        make: makes the grammar from the names of functions whose arguments are any object.
        check: raises ValueError for a grammar that cannot be compiled.
        """
        open_names: list[str] = []
        for function in functions:
            parameters = self.parameters(function)
            try:
                check(Grammar("lark", f"start: arguments\narguments: %json {parameters.json()}\n"))
            except TooCostly:
                raise
            except ValueError as error:
                if parameters.is_strict:
                    raise ValueError(f"the parameters of {function.name!r}: {error}") from None
                open_names.append(function.name)
                self._tell(f"the parameters of {function.name!r} are any object: {error}", function.name)
        made = make(open_names)
        check(made)
        return made


def slim(schema: Any) -> Any:
    """Returns the schema without what says nothing about validity. Names of properties stay."""
    if not isinstance(schema, dict):
        return schema
    kept = {name: value for name, value in schema.items() if name not in ANNOTATIONS}
    return each_part(kept, lambda part, _: slim(part))


def keywords(schema: Any) -> set[str]:
    """Returns all keywords of a schema and of those within it."""
    found: set[str] = set()
    if isinstance(schema, dict):
        found |= schema.keys()

        def part(value: Any, _: tuple[str, ...]) -> Any:
            found.update(keywords(value))
            return value

        each_part(schema, part)
    return found


def _is_no_object(schema: dict[str, Any]) -> bool:
    return schema.get("type", "object") != "object"
