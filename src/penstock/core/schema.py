"""JSON schemas as documents: changes that need not understand what a schema means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

#: Keywords whose values are not schemas but instances, or other data.
_DATA = frozenset({"const", "enum", "default", "examples", "example"})
#: Keywords whose values map names that the author chose to schemas.
_NAMED = frozenset({"properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions"})
_UNIONS = frozenset({"anyOf", "oneOf"})
_DEFINITIONS = frozenset({"$defs", "definitions"})
#: Keywords whose schemas apply to the same instance as the schema that they are in.
_IN_PLACE = _UNIONS | {
    "$ref", "$dynamicRef", "$recursiveRef", "allOf", "not", "if", "then", "else", "dependentSchemas", "dependencies",
}  # fmt: skip
#: Keywords about properties that are not listed.
_OTHERS = frozenset({"additionalProperties", "unevaluatedProperties", "patternProperties"})

#: Values of ``format`` that become grammars. All others are annotations, as in JSON Schema 2020-12.
FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})


def changed(schema: dict[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """*schema*, with each schema directly in it replaced by ``change(keyword, it)``.

    This includes schemas under unknown keywords, since a reference may lead there, but never instances.
    """
    result = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            value = {name: _each(key, part, change) for name, part in value.items()}
        elif key not in _DATA:
            value = _each(key, value, change)
        result[key] = value
    return result


def _each(key: str, value: Any, change: Callable[[str, Any], Any]) -> Any:
    if isinstance(value, list):
        return [_each(key, part, change) for part in value]
    return change(key, value) if isinstance(value, dict) else value


def schemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """*schema* and all schemas in it."""
    yield schema
    found: list[dict[str, Any]] = []
    changed(schema, lambda _, part: found.append(part))
    for part in found:
        yield from schemas(part)


def without_unknown_formats(schema: dict[str, Any]) -> dict[str, Any]:
    """*schema* with only those formats that are in `FORMATS`."""
    if not any("format" in part for part in schemas(schema)):
        return schema
    result = changed(schema, lambda _, part: without_unknown_formats(part))
    if isinstance(form := schema.get("format"), str) and form not in FORMATS:
        del result["format"]
    return result


def moved(schema: dict[str, Any], place: str, anchors: str) -> dict[str, Any]:
    """*schema*, a whole document, as a part of another one: at the pointer *place*, with *anchors* as the prefix of its
    anchors' names.

    A schema with an ``$id`` stays as it is: it is a resource of its own, and references in it are relative to it.
    """
    identity = schema.get("$id")
    if isinstance(identity, str) and not identity.startswith("#"):
        return schema
    result = changed(schema, lambda _, part: moved(part, place, anchors))
    result.pop("$schema", None)  # a part has the dialect of its document
    for key in ("$ref", "$dynamicRef"):
        reference = schema.get(key)
        if not isinstance(reference, str) or not reference.startswith("#"):
            continue
        pointer = reference[1:]
        result[key] = place + pointer if pointer == "" or pointer.startswith("/") else f"#{anchors}{pointer}"
    for key in ("$anchor", "$dynamicAnchor"):
        if isinstance(schema.get(key), str):
            result[key] = anchors + schema[key]
    if isinstance(identity, str):  # how older drafts write an anchor
        del result["$id"]
        result["$anchor"] = anchors + identity[1:]
    return result


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """*schema* whose objects may only have the properties that it lists, unless it says something about others.

    Objects that several schemas describe together stay as they are: each schema sees the properties of the others.
    """
    composed = any(_composed(part) for part in schemas(schema))

    def close(key: str, part: dict[str, Any]) -> dict[str, Any]:
        if key in _IN_PLACE - _UNIONS or (composed and key in _DEFINITIONS):
            return part
        return close_here(part)

    def close_here(part: dict[str, Any]) -> dict[str, Any]:
        beside = _composed(part)
        result = changed(part, lambda key, inner: inner if beside and key in _UNIONS else close(key, inner))
        if _lists_all(part):
            result["additionalProperties"] = False
        return result

    return close_here(schema)


def _lists_all(schema: dict[str, Any]) -> bool:
    """Does *schema* list all properties that it is about, including those that it requires?"""
    listed = schema.get("properties")
    if not isinstance(listed, dict) or not (_OTHERS | _IN_PLACE).isdisjoint(schema):
        return False
    required, least = schema.get("required", []), schema.get("minProperties", 0)
    asks_for_more = isinstance(required, list) and any(name not in listed for name in required if isinstance(name, str))
    return not asks_for_more and not (isinstance(least, int) and least > len(listed))


def _composed(schema: dict[str, Any]) -> bool:
    """Do several schemas describe the properties of one object?"""
    present = _IN_PLACE & schema.keys()
    return bool(present - _UNIONS - {"$ref"}) or (bool(present) and "properties" in schema) or len(present) > 1
