"""Writes the JSON schema of a Kubernetes custom resource, reduced to what refuses a bad manifest.

    python scripts/make/reduce_crd.py CRD.yaml --version v0.12.0 --origin URL > tests/data/jobset.schema.json

Descriptions, defaults, status and rules in CEL are left out. Unknown fields are refused, as ``kubectl apply``
refuses them, except where the resource keeps them on purpose. What occurs more than once (a pod's template,
twice in a LeaderWorkerSet) stands once, under ``$defs``.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

CHECKS = ("type", "enum", "pattern", "required", "format", "minimum", "maximum", "minLength", "maxLength")
CHECKS += ("minItems", "maxItems", "minProperties", "maxProperties", "uniqueItems", "not")
BRANCHES = ("anyOf", "oneOf", "allOf")  # in a custom resource they constrain fields that are declared outside
SHORT = 80  # a schema this long in JSON is not worth a name
METADATA = {name: {"type": "string"} for name in ("name", "namespace", "generateName")} | {
    name: {"type": "object", "additionalProperties": {"type": "string"}} for name in ("labels", "annotations")
}


def reduced(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns ``schema`` without what does not validate, and closed to unknown fields."""
    kept = {key: schema[key] for key in (*CHECKS, *BRANCHES) if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept.pop("anyOf", None)
        kept["type"] = ["integer", "string"]
    if "items" in schema:
        kept["items"] = reduced(schema["items"])
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        kept["additionalProperties"] = reduced(extra)
    if "properties" in schema:
        kept["properties"] = {name: reduced(child) for name, child in schema["properties"].items()}
        if extra is None and not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    return kept


def shared(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns ``schema`` with its repeated parts under ``$defs``, each named after its first field."""
    times: Counter[str] = Counter()
    _count(schema, times)
    names: dict[str, str] = {}
    defs: dict[str, Any] = {}

    def refer(part: dict[str, Any], field: str) -> dict[str, Any]:
        text = json.dumps(part, sort_keys=True)
        if times[text] == 1 or len(text) < SHORT:
            return inside(part, field)
        if text not in names:
            taken = sum(name.rstrip("0123456789") == field for name in names.values())
            names[text] = f"{field}{taken + 1}" if taken else field
            defs[names[text]] = inside(part, field)
        return {"$ref": f"#/$defs/{names[text]}"}

    def inside(part: dict[str, Any], field: str) -> dict[str, Any]:
        part = dict(part)
        if "properties" in part:
            part["properties"] = {name: refer(child, name) for name, child in part["properties"].items()}
        for key in ("items", "additionalProperties"):
            if isinstance(part.get(key), dict):
                part[key] = refer(part[key], field)
        return part

    whole = inside(schema, "")
    return whole | {"$defs": defs}


def _count(part: dict[str, Any], times: Counter[str]) -> None:
    times[json.dumps(part, sort_keys=True)] += 1
    for child in part.get("properties", {}).values():
        _count(child, times)
    for key in ("items", "additionalProperties"):
        if isinstance(part.get(key), dict):
            _count(part[key], times)


def from_crd(crd: dict[str, Any], version: str, origin: str) -> dict[str, Any]:
    """Returns the schema of the stored version of ``crd``."""
    [stored] = [v for v in crd["spec"]["versions"] if v["storage"]]
    schema = reduced(stored["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)
    schema["properties"] |= {
        "apiVersion": {"const": f"{crd['spec']['group']}/{stored['name']}"},
        "kind": {"const": crd["spec"]["names"]["kind"]},
        "metadata": {"type": "object", "required": ["name"], "properties": METADATA},
    }
    schema["properties"]["metadata"]["additionalProperties"] = False
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    about = f"{crd['spec']['names']['kind']} {version}, from {origin}, Apache-2.0; reduced"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": about} | shared(schema)


def main() -> int:
    """Reads the resource definition and prints the schema."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("crd", type=Path)
    parser.add_argument("--version", required=True, help="the release that it is from")
    parser.add_argument("--origin", required=True, help="its address")
    args = parser.parse_args()
    crd = yaml.safe_load(args.crd.read_text(encoding="utf-8"))
    json.dump(from_crd(crd, args.version, args.origin), sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
