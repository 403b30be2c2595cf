"""JSON schemas as llguidance takes them, second part: which objects have no other properties.

An object with named properties is closed if its schema does not say whether others are allowed: every answer
still satisfies the schema, and a model cannot go on adding properties until max_tokens. Only a schema that
stands alone is closed: if several schemas hold for one object (``allOf``, ``anyOf`` together with
``properties``, ...), each closed one would refuse the properties that the others name.
"""

import json
from typing import Any

from jmoe.engine.grammar.schema_keywords import ASSERTIONS, IN_PLACE, each_part, simplified, texts

OPEN = ("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames")
Path = tuple[str, ...]
KINDS = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}


def prepared(text: str) -> str:
    """Returns the schema in ``text`` as JSON text that llguidance can follow; raises ValueError if ``text``
    is not JSON."""
    try:
        schema = simplified(json.loads(text))
        return json.dumps(closed(schema), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("the schema is nested too deeply") from None


def closed(schema: Any) -> Any:
    """Returns a simplified ``schema`` with every object closed that may be closed."""
    made, opened = schema, set[Path]()
    while True:  # schemas that stay open may require others to stay open
        walk = _Walk(schema, frozenset(opened))
        made = walk.close(schema, (), is_alone=walk.has_plain_references)
        if walk.found_paths <= opened:
            return made
        opened |= walk.found_paths


class _Walk:
    """One walk over a document.

    root: document.
    open_paths: paths of schemas that are kept open.
    found_paths: found targets of references that do not stand alone at the place of the reference.
    has_plain_references: whether every reference is a path from the root.
    """

    def __init__(self, root: Any, open_paths: frozenset[Path]):
        self.root, self.open_paths, self.found_paths = root, open_paths, set[Path]()
        self.has_plain_references = all(_path(ref) is not None for ref in _references(root, ()))

    def close(self, schema: Any, path: Path, is_alone: bool) -> Any:
        if not isinstance(schema, dict):
            return schema
        is_alone = is_alone and path not in self.open_paths
        schema = self._exclusive(schema, is_alone)
        rules = schema.keys() & ASSERTIONS
        in_place = rules & set(IN_PLACE)
        # A single schema inside another that itself says nothing (but the type) stands alone too.
        wraps = is_alone and len(in_place) == 1 and rules <= in_place | {"type"}
        if "$ref" in schema and not wraps:
            self.found_paths.update({target} if (target := _path(schema["$ref"])) is not None else ())
        both = {"properties", "patternProperties"} <= schema.keys()

        def part(value: Any, at: Path) -> Any:
            if at[0] in ("$defs", "definitions"):
                return self.close(value, path + at, self.has_plain_references)
            if at[0] in IN_PLACE:
                inner = wraps and (at[0] == "anyOf" or (at[0] == "allOf" and len(schema["allOf"]) == 1))
            else:
                shares = both and at[0] in ("properties", "patternProperties")
                inner = is_alone and not in_place and not shares
            return self.close(value, path + at, inner)

        made = each_part(schema, part)
        if is_alone and self._closes(schema):
            needed = [n for n in schema.get("required", []) if n not in schema["properties"]]
            made["properties"] = made["properties"] | dict.fromkeys(needed, True)
            made["additionalProperties"] = False
        if self._has_no_effect(made):
            del made["maxProperties"]
        return made

    def _has_no_effect(self, schema: dict[str, Any]) -> bool:
        """Returns whether maxProperties has no effect. llguidance supports it only if all properties are
        required."""
        most, names = schema.get("maxProperties"), schema.get("properties", {})
        ends = schema.get("additionalProperties") is False and "patternProperties" not in schema
        return ends and isinstance(most, int) and isinstance(names, dict) and most >= len(names)

    def _closes(self, schema: dict[str, Any]) -> bool:
        """Returns whether an object of this schema, which stands alone, may be closed."""
        names, required = schema.get("properties"), schema.get("required", [])
        if not isinstance(names, dict) or not texts(required) or schema.keys() & {*OPEN, *IN_PLACE}:
            return False
        least = schema.get("minProperties", 0)
        return isinstance(least, int) and least <= len({*names, *required})

    # ---- oneOf -------------------------------------------------------------------------------------

    def _exclusive(self, schema: dict[str, Any], is_alone: bool) -> dict[str, Any]:
        """Returns the schema with ``anyOf`` instead of ``oneOf`` if no value that one branch, as it is
        followed, admits satisfies another branch. llguidance supports only a ``oneOf`` that it finds to be
        so."""
        branches = schema.get("oneOf")
        if not isinstance(branches, list) or "anyOf" in schema:
            return schema
        targets = [self._target(branch) for branch in branches]
        wraps = is_alone and schema.keys() & ASSERTIONS <= {"oneOf", "type"}
        for i, (one, path) in enumerate(targets):
            is_definition = path is not None and path[0] in ("$defs", "definitions") and len(path) == 2
            is_placed = path is None or (is_definition and self.has_plain_references)
            closes = wraps and is_placed and path not in self.open_paths and self._closes(one)
            for j, (other, _) in enumerate(targets):
                if i != j and not self._excludes(one, other, schema, closes):
                    return schema
        return {"anyOf" if name == "oneOf" else name: value for name, value in schema.items()}

    def _target(self, schema: Any) -> tuple[dict[str, Any], Path | None]:
        """Resolves a schema that is only a reference; returns the final target and its path."""
        path = None
        for _ in range(16):
            if not isinstance(schema, dict):
                return {}, path
            if schema.keys() & ASSERTIONS != {"$ref"} or (path := _path(schema["$ref"])) is None:
                break
            schema = _resolve(self.root, path)
        return schema if isinstance(schema, dict) else {}, path

    def _excludes(self, first: dict, second: dict, context: dict, is_closed: bool) -> bool:
        """Returns whether no value that ``first`` admits satisfies ``second``.

        is_closed: whether ``first`` allows only its own properties.
        """
        if _are_disjoint(first, second):
            return True
        if "object" not in (first.get("type"), second.get("type"), context.get("type")):
            return False
        mine, theirs = first.get("properties", {}), second.get("properties", {})
        required = [schema.get("required", []) for schema in (context, second, first)]
        if not (isinstance(mine, dict) and isinstance(theirs, dict) and all(map(texts, required))):
            return False
        is_closed = is_closed or (
            first.get("additionalProperties") is False and "patternProperties" not in first
        )
        for name in required[0] + required[1]:
            if name not in mine:
                if is_closed and name not in required[2]:
                    return True
            elif name in theirs and _are_disjoint(self._target(mine[name])[0], self._target(theirs[name])[0]):
                return True
        return False


def _are_disjoint(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Returns whether clearly no value satisfies both: their constants or types differ."""
    values = _values(first), _values(second)
    if values[0] is not None and values[1] is not None:
        return not {json.dumps(v) for v in values[0]} & {json.dumps(v) for v in values[1]}
    types = _types(first), _types(second)
    return types[0] is not None and types[1] is not None and not types[0] & types[1]


def _values(schema: dict[str, Any]) -> list[Any] | None:
    """Returns the constants that the schema allows. It returns None if the schema has none, or for numbers,
    which have many spellings."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or any(
        type(v) not in KINDS or isinstance(v, dict | list) for v in values
    ):
        return None
    return values


def _types(schema: dict[str, Any]) -> set[str] | None:
    values, types = _values(schema), schema.get("type")
    if values is not None:
        return {KINDS[type(value)] for value in values}
    if isinstance(types, str):
        types = [types]
    if not isinstance(types, list) or not all(isinstance(t, str) for t in types):
        return None
    return {"number" if t == "integer" else t for t in types}


# ---- references ----------------------------------------------------------------------------------------


def _references(schema: Any, path: Path) -> list[Any]:
    """Returns the references of a schema, and None for each name that would change the base of references."""
    if not isinstance(schema, dict):
        return []
    found = [schema[name] for name in ("$ref", "$dynamicRef", "$recursiveRef") if name in schema]
    found += [None for name in ("$id", "id") if path and isinstance(schema.get(name), str)]

    def part(value: Any, at: Path) -> Any:
        found.extend(_references(value, at))
        return value

    each_part(schema, part)
    return found


def _path(reference: Any) -> Path | None:
    """Returns the path of a reference from the root, or None for other references."""
    if (
        not isinstance(reference, str)
        or not (reference == "#" or reference.startswith("#/"))
        or "%" in reference
    ):
        return None
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in reference[1:].split("/")[1:])


def _resolve(root: Any, path: Path) -> Any:
    for step in path:
        if isinstance(root, list) and step.isdecimal() and int(step) < len(root):
            root = root[int(step)]
        elif isinstance(root, dict) and step in root:
            root = root[step]
        else:
            return None
    return root
