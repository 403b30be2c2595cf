"""Grammars of a call's arguments, in each encoding, by the function's schema."""

import json
import re
from collections.abc import Mapping
from typing import Any

from jmoe.server.dialects.format import Format, Tagged
from jmoe.server.dialects.grammars.lark import ANY, MARK, Lark
from jmoe.server.dialects.grammars.schemas import Parameters
from jmoe.server.dialects.reading.declared import kind_of, types_of
from jmoe.server.dialects.reading.scanner import literal_pattern

MAX_NAMED = 64  # llguidance's rules count in a parameter of 64 bits
NAME = re.compile(r"[^\s<>\"'\[\](){}=,\ue000-\uf8ff]{1,128}")
ANY_NAME = r"/[A-Za-z_][A-Za-z0-9_.-]{0,63}/"
# What a schema may say besides its types without narrowing a text or a union of types.
LOOSE = {"type", "anyOf", "oneOf", "$ref"}
# What the schema of all arguments may say.
KNOWN = {
    *("type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"),
}
BOUNDS = {"type", "minLength", "maxLength", "pattern"}


class ArgumentRules:
    """The rules of one function's arguments.

    i: number of the function, in the names of the rules.
    reference: what derives the arguments.
    lines: lines of the grammar.
    """

    def __init__(self, form: Format, i: int, parameters: Parameters, lark: Lark):
        self.form, self.i, self.parameters, self.lark = form, i, parameters, lark
        self.reference, self.lines = f"args_{i}", ""
        match form.arguments:
            case Tagged() as tags:
                self._named(lambda rule, name, schema: self._tagged(tags, rule, name, schema), "")
            case "pythonic":
                self._named(self._keyword, '", "')
            case _:
                self.lines = f"args_{i}: %json {parameters.json()}\n"

    # ---- arguments one by one ----------------------------------------------------------------------

    def _named(self, write: Any, comma: str) -> None:
        """Writes the rules of arguments in any order, each at most once, the required ones at least once.

        write: writes the rule of one argument from its rule's name, the argument's name and its schema.
        comma: text between two arguments, as Lark.
        """
        properties, required = self._properties()
        if properties is None:
            self._unnamed(write, comma)
            return
        if not properties:
            self.lines += f'args_{self.i}: ""\n'
            return
        first, done = f"args_{self.i}", self._done(properties, required)
        rest = f"more_{self.i}" if comma else first
        lists: dict[str, list[str]] = {first: [f'""{done}'], rest: [f'""{done}']}
        for j, (name, schema) in enumerate(properties.items()):
            rule = f"arg_{self.i}_{j}"
            write(rule, name, schema)
            then = f"{rest}::set_bit({j}) %if bit_clear({j})"
            for of, alternatives in lists.items():
                alternatives.append(f"{comma if of == rest else ''} {rule} {then}")
        for of, alternatives in lists.items():
            self.lines += f"{of}::_ : " + "\n | ".join(alternatives) + "\n"
        self.reference = f"{first}::0x0"

    def _done(self, properties: Mapping[str, Any], required: set[str]) -> str:
        bits = [f"bit_set({j})" for j, name in enumerate(properties) if name in required]
        while len(bits) > 1:
            bits[:2] = [f"and({bits[0]}, {bits[1]})"]
        return f" %if {bits[0]}" if bits else ""

    def _properties(self) -> tuple[dict[str, Any] | None, set[str]]:
        """Returns the schemas of named arguments (None if the arguments may have any names) and the names of
        the required ones."""
        schema, leave_out = self.parameters.schema, self.parameters.leave_out
        given = schema.get("properties")
        properties: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
        required = {name for name in schema.get("required", []) if isinstance(name, str)}
        properties |= {name: {} for name in sorted(required - properties.keys())}
        for keyword in sorted(schema.keys() - KNOWN):
            leave_out(f"this model's format of calls cannot follow {keyword} of all arguments")
        for name in [name for name in properties if not NAME.fullmatch(name)]:
            leave_out(f"this model's format of calls cannot write an argument named {name[:64]!r}")
            del properties[name]
        if len(properties) > MAX_NAMED:
            leave_out(f"has {len(properties)} arguments; this model's format of calls follows {MAX_NAMED}")
            return None, set()
        is_open = not properties and schema.get("additionalProperties", True) is not False
        return (None if is_open else properties), required & properties.keys()

    def _unnamed(self, write: Any, comma: str) -> None:
        """Writes the rules of arguments with any names and values."""
        rule = f"arg_{self.i}"
        write(rule, None, {})
        self.lines += f"args_{self.i}: ({rule} ({comma} {rule})*)?\n"

    def _tagged(self, tags: Tagged, rule: str, name: str | None, schema: Any) -> None:
        literal = self.lark.literal
        if name is None:
            opening = f"{literal(tags.key)} {ANY_NAME} {literal(tags.value)}"
        else:
            opening = literal(tags.key + name + tags.value)
        value = self._value(tags, schema)
        self.lines += f"{rule}: {opening} {value}\n"

    def _value(self, tags: Tagged, schema: Any) -> str:
        """Returns what derives a value and what closes it."""
        schema = schema if isinstance(schema, dict) else {}
        kind = kind_of(types_of(schema, self.parameters.schema))
        end, literal = tags.end.rstrip(), self.lark.literal
        if kind == "json":
            return f"{self.lark.rule(f'%json {self.parameters.json(schema)}')} {literal(tags.end)}"
        margin = tags.end[len(end) :]
        listed = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(listed, list):
            texts = [
                each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in listed
            ]
            return f"({' | '.join(map(literal, texts)) or literal('')}) {literal(tags.end)}"
        pattern = self._text_pattern(schema, kind == "text")
        text = None
        if pattern is not None:
            is_apart = MARK.search(end) is not None
            text = self.lark.terminal(
                pattern if is_apart else f"{pattern} & ~/{ANY}{literal_pattern(end)}{ANY}/"
            )
        return f"{self.lark.until(end, text)} {literal(margin) if margin else ''}"

    def _text_pattern(self, schema: dict[str, Any], is_text: bool) -> str | None:
        """Returns an expression of a terminal that the text of a value matches; None for any text."""
        asserted = {name for name in schema if not name.startswith("x-")}
        others = asserted - (BOUNDS if is_text else LOOSE)
        for keyword in sorted(others):
            self.parameters.leave_out(f"this model's format of calls cannot follow {keyword} of a text")
        if not is_text or not asserted & (BOUNDS - {"type"}):
            return None
        parts = []
        if isinstance(expression := schema.get("pattern"), str):
            begin = "" if expression.startswith("^") else ANY
            end = "" if expression.endswith("$") and not expression.endswith("\\$") else ANY
            inner = expression.removeprefix("^")
            inner = inner[:-1] if not end else inner
            parts.append(f"/{begin}({inner.replace('/', chr(92) + '/')}){end}/")
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        if least or most != "":
            parts.append(rf"/(.|\n){{{least},{most}}}/")
        return " & ".join(parts)

    def _keyword(self, rule: str, name: str | None, schema: Any) -> None:
        schema = schema if isinstance(schema, dict) else {}
        opening = f'{ANY_NAME} "="' if name is None else self.lark.literal(f"{name}=")
        types = types_of(schema, self.parameters.schema)
        if types == {"boolean"} and not schema.keys() & {"enum", "const"}:
            self.lines += f'{rule}: {opening} ("True" | "False")\n'
            return
        none = ' | "None"' if "null" in types else ""
        value = self.lark.rule(f"%json {self.parameters.json(schema)}")
        self.lines += f"{rule}: {opening} ({value}{none})\n"
