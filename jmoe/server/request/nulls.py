"""null as the absence of a field, for fields that a struct does not have."""

import functools
from typing import Any

from msgspec import inspect


def without_unknown_nulls(value: Any, kind: type) -> Any:
    """Returns JSON ``value`` of type ``kind`` without the null fields that its structs do not have.

    Values other than structs are data and stay as they are: maps, schemas, lists of numbers.
    """
    return _pruned(value, _shape(kind))


@functools.cache
def _shape(kind: type) -> inspect.Type:
    return inspect.type_info(kind)


def _pruned(value: Any, shape: inspect.Type) -> Any:
    shapes = shape.types if isinstance(shape, inspect.UnionType) else (shape,)
    if isinstance(value, list):
        items = next((s.item_type for s in shapes if isinstance(s, inspect.ListType)), None)
        return [_pruned(v, items) for v in value] if isinstance(items, inspect.StructType) else value
    struct = next((s for s in shapes if isinstance(s, inspect.StructType) and _is_of(value, s)), None)
    if struct is None:
        return value
    known: dict[str, inspect.Type] = {field.encode_name: field.type for field in struct.fields}
    kept = {name: v for name, v in value.items() if v is not None or name in known}
    return {name: _pruned(v, known[name]) if name in known else v for name, v in kept.items()}


def _is_of(value: Any, struct: inspect.StructType) -> bool:
    return isinstance(value, dict) and (struct.tag_field is None or value.get(struct.tag_field) == struct.tag)
