"""Small random JSON schemas, and random answers of a grammar: for tests against ``jsonschema``."""

import json

import numpy as np
from support.server.fake_engine import EOS

NAMES = ["a", "b", "allOf", "$ref", "required"]


def value_schema(rng: np.random.Generator, depth: int):
    """Returns the schema of one value: often a plain one, sometimes an object again."""
    if depth and rng.random() < 0.35:
        return object_schema(rng, depth - 1)
    plain = [
        {"type": "string", "maxLength": 2, "minLength": 0}, {"type": "integer", "minimum": 0, "maximum": 9},
        {"enum": ["x", 1, None]}, {"const": "x"}, {"const": "y"}, {"type": "boolean"},
        {"type": ["null", "boolean"]},
        {"type": "array", "items": {"const": 1}, "maxItems": 2, "minItems": 0, "uniqueItems": False},
        {"type": "string", "format": "nothing-known", "maxLength": 1},
    ]  # fmt: skip
    return plain[rng.integers(len(plain))]


def object_schema(rng: np.random.Generator, depth: int = 2) -> dict:
    names = [n for n in NAMES if rng.random() < 0.45]
    made: dict = {"type": "object"} if rng.random() < 0.9 else {}
    if rng.random() < 0.85:
        made["properties"] = {n: value_schema(rng, depth) for n in names}
    if rng.random() < 0.6:
        made["required"] = [n for n in NAMES if rng.random() < 0.3]
    if rng.random() < 0.15:
        made["additionalProperties"] = [False, {"type": "null"}, True][rng.integers(3)]
    if rng.random() < 0.15:
        made["maxProperties"] = int(rng.integers(1, 4))
    if rng.random() < 0.15:
        made["propertyNames"] = [{"type": "string"}, True, {"enum": NAMES[:3]}][rng.integers(3)]
    if rng.random() < 0.15:
        made["dependentRequired"] = {"a": ["b"]} if "a" in made.get("required", []) else {}
    for name, share in (("anyOf", 0.2), ("oneOf", 0.25), ("allOf", 0.15)):
        if depth and rng.random() < share:
            made[name] = [branch(rng, depth - 1) for _ in range(rng.integers(1, 3))]
    if depth and rng.random() < 0.2:
        made["$ref"] = "#/$defs/" + ["one", "two"][rng.integers(2)]
    return made


def branch(rng: np.random.Generator, depth: int):
    kind = rng.random()
    if kind < 0.3:
        return {"$ref": "#/$defs/" + ["one", "two"][rng.integers(2)]}
    return value_schema(rng, 0) if kind < 0.4 else object_schema(rng, depth)


def document(rng: np.random.Generator) -> dict:
    defs = {"one": object_schema(rng, 0), "two": object_schema(rng, 0)}
    if rng.random() < 0.35:  # unions that say which one they are
        for name, definition in defs.items():
            definition["properties"] = {**definition.get("properties", {}), "a": {"const": name}}
            definition["required"] = ["a", *(n for n in definition.get("required", []) if n != "a")]
    top = object_schema(rng) if rng.random() < 0.7 else {"oneOf": [branch(rng, 1), branch(rng, 1)]}
    return {**top, "$defs": defs}


def walk(constraint, rng: np.random.Generator, most: int = 250) -> str | None:
    """Returns the text of a random answer of one byte a token, or None if it has not ended by then."""
    tokens: list[int] = []
    while len(tokens) < most:
        allowed = np.flatnonzero(np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little"))
        closing = [t for t in allowed if t in (34, 93, 125, EOS)]
        pool = closing if closing and rng.random() < 0.6 else allowed
        token = int(pool[rng.integers(len(pool))])
        if token == EOS:
            return bytes(tokens).decode()
        constraint.accept(token)
        tokens.append(token)
    return None


def instances() -> list:
    """Returns values one of which satisfies most of the schemas that can be satisfied."""
    values = ["x", "y", "", 1, 5, None, True, [], [1], {}, "one", "two"]
    found: list = [*values]
    for i, a in enumerate(NAMES):
        found += [{a: v} for v in values]
        for b in NAMES[i + 1 :]:
            found += [{a: v, b: w} for v in values for w in values]
    rng = np.random.default_rng(5)
    for _ in range(1500):
        names = [n for n in NAMES if rng.random() < 0.6]
        found.append({n: values[rng.integers(len(values))] for n in names})
    return [json.loads(json.dumps(v)) for v in found]
