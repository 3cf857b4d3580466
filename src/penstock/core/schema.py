"""JSON schemas as documents: what may be done to one without knowing what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

#: Keywords whose values are instances, or anything else that is no schema.
_DATA = frozenset({"const", "enum", "default", "examples", "example"})
#: Keywords whose values have schemas under names of the author's.
_NAMED = frozenset({"properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions"})
_UNIONS = frozenset({"anyOf", "oneOf"})
_DEFINITIONS = frozenset({"$defs", "definitions"})
#: Keywords whose schemas are about the same instance as the one that they are in.
_IN_PLACE = _UNIONS | {
    "$ref", "$dynamicRef", "$recursiveRef", "allOf", "not", "if", "then", "else", "dependentSchemas", "dependencies",
}  # fmt: skip
#: Keywords that say something of properties beside those that are listed.
_OTHERS = frozenset({"additionalProperties", "unevaluatedProperties", "patternProperties"})

#: Values of ``format`` that grammars are made of. Any other one is an annotation, as JSON Schema 2020-12 has it.
FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})


def changed(schema: dict[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """*schema*, with each schema in it replaced by what *change* makes of the keyword that it is under, and of it.

    Also under keywords that nobody knows: a reference may lead there. Never what is an instance.
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
    """*schema* with those formats only that are in `FORMATS`."""
    if not any("format" in part for part in schemas(schema)):
        return schema
    result = changed(schema, lambda _, part: without_unknown_formats(part))
    if isinstance(form := schema.get("format"), str) and form not in FORMATS:
        del result["format"]
    return result


def moved(schema: dict[str, Any], place: str, anchors: str) -> dict[str, Any]:
    """*schema*, a document of its own, as a part of another one: at the pointer *place*, and with *anchors* before the
    names of its anchors.

    What has an ``$id`` is a resource of its own wherever it is: what refers into it is relative to that.
    """
    identity = schema.get("$id")
    if isinstance(identity, str) and not identity.startswith("#"):
        return schema
    result = changed(schema, lambda _, part: moved(part, place, anchors))
    result.pop("$schema", None)  # a part of a document is in that one's dialect
    for key in ("$ref", "$dynamicRef"):
        reference = schema.get(key)
        if not isinstance(reference, str) or not reference.startswith("#"):
            continue
        pointer = reference[1:]
        result[key] = place + pointer if pointer == "" or pointer.startswith("/") else f"#{anchors}{pointer}"
    for key in ("$anchor", "$dynamicAnchor"):
        if isinstance(schema.get(key), str):
            result[key] = anchors + schema[key]
    if isinstance(identity, str):  # how an anchor was written before there were anchors
        del result["$id"]
        result["$anchor"] = anchors + identity[1:]
    return result


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """*schema* where objects have the properties that it lists, and no others unless it says something of others.

    What is composed of several schemas, each of which sees the others' properties, is left as it is.
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
    """Are all the properties that it is about listed, also those that it asks for?"""
    listed = schema.get("properties")
    if not isinstance(listed, dict) or not (_OTHERS | _IN_PLACE).isdisjoint(schema):
        return False
    required, least = schema.get("required", []), schema.get("minProperties", 0)
    asks_for_more = isinstance(required, list) and any(name not in listed for name in required if isinstance(name, str))
    return not asks_for_more and not (isinstance(least, int) and least > len(listed))


def _composed(schema: dict[str, Any]) -> bool:
    """Do several schemas say something of one object's properties?"""
    present = _IN_PLACE & schema.keys()
    return bool(present - _UNIONS - {"$ref"}) or (bool(present) and "properties" in schema) or len(present) > 1
