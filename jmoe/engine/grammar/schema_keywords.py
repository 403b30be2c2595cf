"""JSON schemas as llguidance takes them, first part: each schema object by itself.

llguidance refuses keywords that it does not implement even if they have no effect, and matches some texts
that the standards exclude. The result has the same meaning by JSON Schema 2020-12.
"""

import math
import re
from collections.abc import Callable
from typing import Any

DRAFTS = ("draft/2020-12", "draft/2019-09", "draft-07", "draft-06", "draft-04")
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE = (
    *("items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"),
    *("propertyNames", "contains", "not", "if", "then", "else"),
)
IN_PLACE = (
    "$ref",
    "$dynamicRef",
    "$recursiveRef",
    "allOf",
    "anyOf",
    "oneOf",
    "if",
    "not",
    "dependentSchemas",
)
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
COUNTS += ("minContains", "maxContains")
ASSERTIONS = {
    *(
        *MAPS[:2],
        *LISTS,
        *SINGLE,
        *IN_PLACE,
        *COUNTS,
        "type",
        "const",
        "enum",
        "required",
        "dependentRequired",
    ),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "pattern", "format"),
    *("uniqueItems", "dependencies"),
}
EXACT = 2**53  # integers up to it are exact in float64, with which llguidance computes

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP}-02-29)"
_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR}:[0-5][0-9](?:\.[0-9]+)?(?:[zZ]|[+-]{_HOUR})"
# Formats that are checked: with these expressions (RFC 3339, without leap seconds) and by llguidance itself.
EXPRESSIONS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[tT]{_TIME}$"}
FORMATS = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")

# White space and line ends of ECMA-262; llguidance's expressions use Unicode's white space and the line feed.
SPACE = r"\t\n\x0B\x0C\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}"
ANY_BUT_LINE_ENDS = r"[^\n\r\x{2028}\x{2029}]"


def each_part(schema: dict[str, Any], change: Callable[[Any, tuple[str, ...]], Any]) -> dict[str, Any]:
    """Returns the schema with ``change(subschema, path to it)`` in place of each schema that is directly in
    it."""
    made = dict(schema)
    for name, value in schema.items():
        if name in MAPS and isinstance(value, dict):
            made[name] = {key: change(part, (name, key)) for key, part in value.items()}
        elif name in (*LISTS, "items") and isinstance(value, list):
            made[name] = [change(part, (name, str(i))) for i, part in enumerate(value)]
        elif name in SINGLE:
            made[name] = change(value, (name,))
    return made


def simplified(schema: Any) -> Any:
    """Returns the same schema without keywords that have no effect; the others are in llguidance's form."""
    if not isinstance(schema, dict):
        return schema
    made = each_part(schema, lambda part, _: simplified(part))
    for change in (_numbers, _strings, _names, _objects, _arrays, _conditions):
        change(made)
    if isinstance(made.get("$schema"), str) and not any(draft in made["$schema"] for draft in DRAFTS):
        del made["$schema"]
    for name in ("$dynamicAnchor", "$recursiveAnchor"):
        made.pop(name, None)
    return made


def accepts_anything(schema: Any) -> bool:
    """Returns whether a simplified schema clearly holds for every value."""
    return schema is True or (isinstance(schema, dict) and not schema.keys() & ASSERTIONS)


def _numbers(schema: dict[str, Any]) -> None:
    for name in COUNTS:
        if isinstance(schema.get(name), float) and schema[name].is_integer():
            schema[name] = int(schema[name])
    for name, inward in (("minimum", math.inf), ("exclusiveMinimum", math.inf), ("maximum", -math.inf),
                         ("exclusiveMaximum", -math.inf)):  # fmt: skip
        bound = schema.get(name)
        if isinstance(bound, int) and abs(bound) > EXACT:
            near = _float(bound)
            outside = near < bound if inward > 0 else near > bound
            schema[name] = int(math.nextafter(near, inward) if outside else near)
    listed = schema.get("enum")
    for value in [schema.get("const"), *(listed if isinstance(listed, list) else [])]:
        if isinstance(value, int) and abs(value) > EXACT:
            raise ValueError(f"const and enum: {value} is beyond 2**53, up to which numbers are exact")


def _names(schema: dict[str, Any]) -> None:
    """Expresses propertyNames by the properties themselves, if that is possible."""
    names = schema.get("propertyNames")
    if names is None:
        return
    rules = {} if accepts_anything(names) else dict(names) if isinstance(names, dict) else {"": names}
    rules = {name: rule for name, rule in rules.items() if name in ASSERTIONS or not name}
    if rules.get("type") == "string":
        del rules["type"]
    others = schema.get("additionalProperties", True)
    known = schema.get("properties", {})
    if not rules:
        del schema["propertyNames"]
    elif rules.keys() <= {"enum"} and "patternProperties" not in schema and isinstance(known, dict):
        allowed = rules["enum"] if isinstance(rules["enum"], list) else []
        schema["properties"] = {n: known.get(n, others) for n in allowed if isinstance(n, str)}
        schema["additionalProperties"] = False
        del schema["propertyNames"]
    elif rules.keys() <= {"pattern"} and not known and "patternProperties" not in schema:
        # The expression is in llguidance's dialect already: it comes from a simplified schema.
        schema["patternProperties"] = {rules["pattern"]: others}
        schema["additionalProperties"] = False
        del schema["propertyNames"]


def _objects(schema: dict[str, Any]) -> None:
    needed = schema.get("dependentRequired")
    if isinstance(needed, dict) and all(map(texts, [*needed.values(), schema.get("required", [])])):
        required = list(schema.get("required", []))
        for name in required:  # grows during the loop: a required property may require others
            required += [n for n in needed.get(name, []) if n not in required]
        left = {name: names for name, names in needed.items() if set(names) - set(required)}
        if required:
            schema["required"] = required
        _set_or_delete(schema, "dependentRequired", left)
    for name in ("dependentSchemas", "dependencies"):
        if isinstance(schema.get(name), dict):
            effective = {k: v for k, v in schema[name].items() if v != [] and not accepts_anything(v)}
            _set_or_delete(schema, name, effective)
    least = schema.get("minProperties")
    required = schema.get("required", [])
    if isinstance(least, int) and texts(required) and least <= len(set(required)):
        del schema["minProperties"]
    rest = schema.get("unevaluatedProperties")
    if rest is not None and (accepts_anything(rest) or not schema.keys() & set(IN_PLACE)):
        schema.setdefault("additionalProperties", rest)
        del schema["unevaluatedProperties"]


def _arrays(schema: dict[str, Any]) -> None:
    few = isinstance(schema.get("maxItems"), int) and schema["maxItems"] < 2
    if schema.get("uniqueItems") is False or (schema.get("uniqueItems") is True and few):
        del schema["uniqueItems"]
    if not isinstance(schema.get("items"), list):
        schema.pop("additionalItems", None)
    if "contains" not in schema or (schema.get("minContains") == 0 and "maxContains" not in schema):
        for name in ("contains", "minContains", "maxContains"):
            schema.pop(name, None)
    rest = schema.get("unevaluatedItems")
    if rest is not None and (accepts_anything(rest) or not schema.keys() & {*IN_PLACE, "contains"}):
        schema.setdefault("items", rest)
        del schema["unevaluatedItems"]


def _conditions(schema: dict[str, Any]) -> None:
    if schema.get("not") is False:
        del schema["not"]
    for name in ("then", "else"):
        if "if" not in schema or accepts_anything(schema.get(name)):
            schema.pop(name, None)
    if "then" not in schema and "else" not in schema:
        schema.pop("if", None)


def _strings(schema: dict[str, Any]) -> None:
    if isinstance(schema.get("pattern"), str):
        schema["pattern"] = ecma(schema["pattern"])
    if isinstance(schema.get("patternProperties"), dict):
        schema["patternProperties"] = {ecma(key): value for key, value in schema["patternProperties"].items()}
    form = schema.get("format")
    if isinstance(form, str) and form not in FORMATS:  # an annotation, or one of ``EXPRESSIONS``
        del schema["format"]
        if form in EXPRESSIONS and "pattern" not in schema:
            schema["pattern"] = EXPRESSIONS[form]
        elif form in EXPRESSIONS and isinstance(schema.get("allOf", []), list):
            schema["allOf"] = [*schema.get("allOf", []), {"pattern": EXPRESSIONS[form]}]
    if form == "hostname" and isinstance(schema.get("maxLength", 253), int):
        schema["maxLength"] = min(schema.get("maxLength", 253), 253)


def texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _float(number: int) -> float:
    try:
        return float(number)
    except OverflowError:
        raise ValueError("a bound is beyond the numbers that JSON schemas are followed for") from None


def _set_or_delete(schema: dict[str, Any], name: str, value: dict[str, Any]) -> None:
    if value:
        schema[name] = value
    else:
        del schema[name]


TOKEN = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\c[A-Za-z]|\\.|\[\^\]|\[\]|.", re.S)


def ecma(pattern: str) -> str:
    """Returns an expression of ECMA-262 in the dialect of Rust's ``regex``, which llguidance takes."""
    made, inside = "", False
    for token in TOKEN.findall(pattern):
        if token.startswith("\\u") and len(token) == 12:  # a pair of surrogates
            high, low = int(token[2:6], 16), int(token[8:], 16)
            token = f"\\x{{{0x10000 + ((high & 0x3FF) << 10 | low & 0x3FF):X}}}"
        elif token.startswith("\\c") and len(token) == 3:
            token = f"\\x{{{ord(token[2]) % 32:X}}}"
        elif token == "\\s":
            token = SPACE if inside else f"[{SPACE}]"
        elif token == "\\S":
            token = f"[^{SPACE}]"
        elif inside and token in ("[", "&", "~"):
            token = "\\" + token
        elif inside and token in ("[^]", "[]"):  # a bracket, and the end of the class that contains it
            token, inside = "\\" + token[:-1] + "]", False
        elif not inside and token == "[^]":
            token = r"[\x{0}-\x{10FFFF}]"
        elif not inside and token == ".":
            token = ANY_BUT_LINE_ENDS
        elif token in "[]":
            inside = token == "["
        made += token
    return made
