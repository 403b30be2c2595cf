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
    """The schema with ``change(subschema, path to it)`` in place of each schema that is directly in it."""
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
    """The same schema without keywords that have no effect; the others are in llguidance's form."""
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


def anything(schema: Any) -> bool:
    """Whether a simplified schema clearly holds for every value."""
    return schema is True or (isinstance(schema, dict) and not schema.keys() & ASSERTIONS)


def _numbers(made: dict[str, Any]) -> None:
    for name in COUNTS:
        if isinstance(made.get(name), float) and made[name].is_integer():
            made[name] = int(made[name])
    for name, inward in (("minimum", math.inf), ("exclusiveMinimum", math.inf), ("maximum", -math.inf),
                         ("exclusiveMaximum", -math.inf)):  # fmt: skip
        bound = made.get(name)
        if isinstance(bound, int) and abs(bound) > EXACT:
            near = _float(bound)
            outside = near < bound if inward > 0 else near > bound
            made[name] = int(math.nextafter(near, inward) if outside else near)
    listed = made.get("enum")
    for value in [made.get("const"), *(listed if isinstance(listed, list) else [])]:
        if isinstance(value, int) and abs(value) > EXACT:
            raise ValueError(f"const and enum: {value} is beyond 2**53, up to which numbers are exact")


def _names(made: dict[str, Any]) -> None:
    """Expresses propertyNames by the properties themselves, if that is possible."""
    names = made.get("propertyNames")
    if names is None:
        return
    rules = {} if anything(names) else dict(names) if isinstance(names, dict) else {"": names}
    rules = {name: rule for name, rule in rules.items() if name in ASSERTIONS or not name}
    if rules.get("type") == "string":
        del rules["type"]
    others = made.get("additionalProperties", True)
    known = made.get("properties", {})
    if not rules:
        del made["propertyNames"]
    elif rules.keys() <= {"enum"} and "patternProperties" not in made and isinstance(known, dict):
        allowed = rules["enum"] if isinstance(rules["enum"], list) else []
        made["properties"] = {n: known.get(n, others) for n in allowed if isinstance(n, str)}
        made["additionalProperties"] = False
        del made["propertyNames"]
    elif rules.keys() <= {"pattern"} and not known and "patternProperties" not in made:
        # The expression is in llguidance's dialect already: it comes from a simplified schema.
        made["patternProperties"] = {rules["pattern"]: others}
        made["additionalProperties"] = False
        del made["propertyNames"]


def _objects(made: dict[str, Any]) -> None:
    needed = made.get("dependentRequired")
    if isinstance(needed, dict) and all(map(texts, [*needed.values(), made.get("required", [])])):
        required = list(made.get("required", []))
        for name in required:  # grows during the loop: a required property may require others
            required += [n for n in needed.get(name, []) if n not in required]
        left = {name: names for name, names in needed.items() if set(names) - set(required)}
        if required:
            made["required"] = required
        _keep(made, "dependentRequired", left)
    for name in ("dependentSchemas", "dependencies"):
        if isinstance(made.get(name), dict):
            _keep(made, name, {k: v for k, v in made[name].items() if v != [] and not anything(v)})
    least = made.get("minProperties")
    required = made.get("required", [])
    if isinstance(least, int) and texts(required) and least <= len(set(required)):
        del made["minProperties"]
    rest = made.get("unevaluatedProperties")
    if rest is not None and (anything(rest) or not made.keys() & set(IN_PLACE)):
        made.setdefault("additionalProperties", rest)
        del made["unevaluatedProperties"]


def _arrays(made: dict[str, Any]) -> None:
    few = isinstance(made.get("maxItems"), int) and made["maxItems"] < 2
    if made.get("uniqueItems") is False or (made.get("uniqueItems") is True and few):
        del made["uniqueItems"]
    if not isinstance(made.get("items"), list):
        made.pop("additionalItems", None)
    if "contains" not in made or (made.get("minContains") == 0 and "maxContains" not in made):
        for name in ("contains", "minContains", "maxContains"):
            made.pop(name, None)
    rest = made.get("unevaluatedItems")
    if rest is not None and (anything(rest) or not made.keys() & {*IN_PLACE, "contains"}):
        made.setdefault("items", rest)
        del made["unevaluatedItems"]


def _conditions(made: dict[str, Any]) -> None:
    if made.get("not") is False:
        del made["not"]
    for name in ("then", "else"):
        if "if" not in made or anything(made.get(name)):
            made.pop(name, None)
    if "then" not in made and "else" not in made:
        made.pop("if", None)


def _strings(made: dict[str, Any]) -> None:
    if isinstance(made.get("pattern"), str):
        made["pattern"] = ecma(made["pattern"])
    if isinstance(made.get("patternProperties"), dict):
        made["patternProperties"] = {ecma(key): value for key, value in made["patternProperties"].items()}
    form = made.get("format")
    if isinstance(form, str) and form not in FORMATS:  # an annotation, or one of ``EXPRESSIONS``
        del made["format"]
        if form in EXPRESSIONS and "pattern" not in made:
            made["pattern"] = EXPRESSIONS[form]
        elif form in EXPRESSIONS and isinstance(made.get("allOf", []), list):
            made["allOf"] = [*made.get("allOf", []), {"pattern": EXPRESSIONS[form]}]
    if form == "hostname" and isinstance(made.get("maxLength", 253), int):
        made["maxLength"] = min(made.get("maxLength", 253), 253)


def texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _float(whole: int) -> float:
    try:
        return float(whole)
    except OverflowError:
        raise ValueError("a bound is beyond the numbers that JSON schemas are followed for") from None


def _keep(made: dict[str, Any], name: str, left: dict[str, Any]) -> None:
    if left:
        made[name] = left
    else:
        del made[name]


TOKEN = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\c[A-Za-z]|\\.|\[\^\]|\[\]|.", re.S)


def ecma(pattern: str) -> str:
    """An expression of ECMA-262 in the dialect of Rust's ``regex``, which llguidance takes."""
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
