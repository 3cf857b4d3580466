"""JSON as clients really send it: a null for a field that may be left out, ``3.0`` for the integer 3."""

from __future__ import annotations

import functools
from typing import Any

from msgspec import inspect


def plain(value: Any, kind: type) -> Any:
    """Untyped JSON, as a body of the type *kind* has it strictly.

    Nulls of optional fields are left out, integral floats are integers where one is wanted. What does not fit stays as
    it is, for the decoder to refuse, and so does all that is free (``Any``).
    """
    return _plain(value, _type(kind))


@functools.cache
def _type(kind: type) -> inspect.Type:
    return inspect.type_info(kind)


def _plain(value: Any, kind: inspect.Type) -> Any:
    match _meant(value, kind):
        case inspect.StructType(fields=fields) if isinstance(value, dict):
            known = {field.encode_name: field for field in fields}
            return {
                name: _plain(each, known[name].type) if name in known else each
                for name, each in value.items()
                if each is not None or name not in known or known[name].required or takes_null(known[name].type)
            }
        case inspect.DictType(value_type=inner) if isinstance(value, dict):
            return {name: _plain(each, inner) for name, each in value.items()}
        case inspect.ListType(item_type=inner) if isinstance(value, list):
            return [_plain(each, inner) for each in value]
        case inspect.IntType() if isinstance(value, float) and value.is_integer():
            return int(value)
    return value


def _meant(value: Any, kind: inspect.Type) -> inspect.Type:
    """Of what *kind* allows, the type that *value* can only be; `AnyType` if there is none to look at."""
    if isinstance(kind, inspect.Metadata):
        return _meant(value, kind.type)
    if not isinstance(kind, inspect.UnionType):
        return kind
    kinds = [_meant(value, each) for each in kind.types]
    wanted: tuple[type[inspect.Type], ...] = ()
    if isinstance(value, dict):
        wanted = (inspect.StructType, inspect.DictType)
    elif isinstance(value, list):
        wanted = (inspect.ListType,)
    elif isinstance(value, float) and not any(isinstance(each, inspect.FloatType) for each in kinds):
        wanted = (inspect.IntType,)
    return next((each for each in kinds if isinstance(each, wanted) and _tagged(value, each)), inspect.AnyType())


def _tagged(value: Any, kind: inspect.Type) -> bool:
    """Has *value* the tag of *kind*, where that is one of several objects?"""
    return not isinstance(kind, inspect.StructType) or kind.tag_field is None or value.get(kind.tag_field) == kind.tag


def takes_null(kind: inspect.Type) -> bool:
    """Is null a value of its own for *kind*?"""
    if isinstance(kind, inspect.Metadata):
        return takes_null(kind.type)
    if isinstance(kind, inspect.UnionType):
        return any(takes_null(each) for each in kind.types)
    return isinstance(kind, inspect.NoneType | inspect.AnyType | inspect.RawType)
