"""``--option NAME=VALUE`` as a frozen dataclass: each engine says one, whose defaults tell the types."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from penstock.core.errors import ModelLoadError

T = TypeVar("T")

_SWITCH = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


def parse(cls: type[T], given: Mapping[str, Any], engine: str) -> T:
    """An instance of the dataclass *cls* with the values *given* (texts, mostly) for its fields.

    What the values mean together is checked by the dataclass itself (``__post_init__``). Raises `ModelLoadError` for an
    unknown name (with the nearest known one) or a bad value.
    """
    types = {field.name: type(field.default) for field in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(types)}."
            raise ModelLoadError(f"The {engine} engine has no option {name!r}: {hint}")
        values[name] = _value(name, value, types[name])
    return cls(**values)


def _value(name: str, value: Any, kind: type) -> Any:
    if kind is bool:
        if (switch := _SWITCH.get(str(value).lower())) is None:
            raise ModelLoadError(f"Option {name} is on or off, not {value!r}.")
        return switch
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ModelLoadError(f"Option {name} is a number, not {value!r}.") from None


def one_of(name: str, value: str, *allowed: str) -> None:
    """Raise `ModelLoadError` unless *value* of option *name* is one of *allowed*."""
    if value not in allowed:
        raise ModelLoadError(f"Option {name} is {', '.join(allowed[:-1])} or {allowed[-1]}, not {value!r}.")
