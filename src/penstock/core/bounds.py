"""What costs too much: bounds of schemas, expressions and choices that a reply may have to obey."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import msgspec

from penstock.core.errors import InvalidRequest
from penstock.core.job import ResponseFormat

#: Limits of a schema: bytes of its JSON, and levels of nesting (parsers downstream stop at 128).
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64
#: Limit of ``multipleOf``, in units of its last digit: its automaton has that many states.
MAX_MULTIPLE = 10_000
#: Limits of a regular expression, in characters, and of the texts that a reply may be chosen from.
MAX_PATTERN = 4096
MAX_CHOICES = 1024


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Refuse a JSON schema that would cost too much to follow; *param* names the field it came in.

    Raises `InvalidRequest`. Whether every keyword can be followed is for the engine to say.
    """
    size = len(msgspec.json.encode(schema))
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"The JSON schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are taken.", param=param)
    multiples: list[Fraction] = []
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        below: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                multiples += _multiple(part.get("multipleOf"), param)
                below += part.values()
            elif isinstance(part, list):
                below += part
            elif isinstance(part, int) and not -(2**63) <= part < 2**64:
                raise InvalidRequest("The JSON schema has a number of more than 64 bits.", param=param)
        level = below
        if not level:
            break
    else:
        raise InvalidRequest(f"The JSON schema is nested more than {MAX_SCHEMA_DEPTH} levels deep.", param=param)
    unit = math.lcm(1, *(multiple.denominator for multiple in multiples))
    if math.lcm(1, *(int(multiple * unit) for multiple in multiples)) > MAX_MULTIPLE:
        raise InvalidRequest(
            f"The schema's multipleOf values have a least common multiple above {MAX_MULTIPLE} (in units of their last "
            "digit); leave some of them out.",
            param=param,
        )


def check_form(form: ResponseFormat, param: str) -> None:
    """Refuse a form other than JSON that is empty or too large; *param* names the field it came in.

    Raises `InvalidRequest`. Whether it can be followed is for the engine to say.
    """
    size = len(form.pattern) + len(form.grammar) + sum(map(len, form.choices))
    if form.json_schema is None and not (form.choices if form.type == "choice" else size):
        raise InvalidRequest(f"The {form.type} is empty.", param=param)
    if len(form.pattern) > MAX_PATTERN:
        raise InvalidRequest(
            f"The regular expression has {len(form.pattern)} characters; at most {MAX_PATTERN} are taken.", param=param
        )
    if len(form.choices) > MAX_CHOICES:
        raise InvalidRequest(f"There are {len(form.choices)} choices; at most {MAX_CHOICES} are taken.", param=param)
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(
            f"The {form.type} has {size} characters; at most {MAX_SCHEMA_BYTES} are taken.", param=param
        )


def _multiple(value: Any, param: str) -> list[Fraction]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []  # none, or a property of that name
    if not 1e-6 <= value <= 1e9:
        raise InvalidRequest("multipleOf must be between 0.000001 and 1,000,000,000.", param=param)
    return [Fraction(repr(value))]
