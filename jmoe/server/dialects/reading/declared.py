"""The types that a function's schema declares for its arguments: they alone decide what a raw text means."""

import json
from collections.abc import Mapping
from typing import Any, Literal

TYPES = frozenset({"string", "number", "boolean", "null", "object", "array"})
MAX_DEPTH = 8  # of references and unions
# Of a value that stands between tags: a text, JSON, or JSON of some types and else a text.
Kind = Literal["text", "json", "either"]


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """Returns the JSON types that ``schema`` admits (an integer is a number); all if it does not say.

    root: document within which its references are.
    """
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return TYPES
    found = TYPES
    if isinstance(reference := schema.get("$ref"), str):
        found &= types_of(_resolved(reference, root), root, depth + 1)
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(listed, list):
        found &= frozenset(map(type_of, listed))
    said = schema.get("type")
    names = [said] if isinstance(said, str) else said
    if isinstance(names, list):
        found &= {"number" if name == "integer" else name for name in names if isinstance(name, str)}
    for word in ("anyOf", "oneOf"):
        if isinstance(branches := schema.get(word), list):
            found &= frozenset[str]().union(*(types_of(branch, root, depth + 1) for branch in branches))
    if isinstance(parts := schema.get("allOf"), list):
        for part in parts:
            found &= types_of(part, root, depth + 1)
    return found


def kind_of(types: frozenset[str]) -> Kind:
    return "json" if "string" not in types else "text" if types == {"string"} else "either"


def type_of(value: Any) -> str:
    """Returns the JSON type of a decoded value."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number"
    return {str: "string", list: "array"}.get(type(value), "object")


def argument_types(parameters: Mapping[str, Any] | None) -> dict[str, frozenset[str]]:
    """Returns the declared types of each argument of a function."""
    parameters = parameters or {}
    properties = parameters.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    return {name: types_of(schema, parameters) for name, schema in properties.items()}


def json_of(text: str, types: frozenset[str]) -> str:
    """Returns JSON for a value that stands between tags and is no pure text.

    It is the text itself if that is JSON of a declared type (of one other than "string"); words of Python
    count as theirs. Any other text is a string.
    """
    word = text.strip()
    word = {"True": "true", "False": "false", "None": "null"}.get(word, word)
    try:
        value = json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if "string" not in types or (type_of(value) in types and not isinstance(value, str)):
        return word
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _resolved(reference: str, root: Any) -> Any:
    """Returns the schema at a path from the root, or None for other references."""
    if not reference.startswith("#"):
        return None
    for step in reference[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        root = root.get(step) if isinstance(root, Mapping) else None
    return root
