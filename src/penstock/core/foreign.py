"""JSON from outside: what others wrote, which may be anything at all.

Whoever reads it knows one error, `Malformed`. msgspec has four: its own, `UnicodeDecodeError` (bytes that are no
UTF-8), `UnicodeEncodeError` (half a surrogate in a `str`) and `RecursionError` (nested too deeply).
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_SURROGATE = re.compile("[\ud800-\udfff]")


class Malformed(ValueError):
    """What came is not what it has to be. The message completes "it is …"."""


class Mismatch(Malformed):
    """It is JSON, and another value than it has to be. The message is msgspec's, with the place."""


def decode(raw: bytes | bytearray | memoryview | str, kind: type[T]) -> T:
    """*raw* as a *kind*. Raises `Malformed`, and nothing else."""
    try:
        found: T = _decoder(kind).decode(raw)  # type: ignore[arg-type]
    except msgspec.ValidationError as error:
        raise Mismatch(str(error)) from error
    except msgspec.DecodeError as error:
        raise Malformed(f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise Malformed("nested too deeply") from error
    except UnicodeError as error:
        raise Malformed("not valid UTF-8") from error
    return found


def loads(raw: bytes | str) -> Any:
    """The value in *raw*, as forgivingly as can be: with halves of surrogates where it has some (`whole` deals with
    them), and None for NaN and infinity, which Python's servers write. Raises `Malformed`, and nothing else."""
    try:
        return json.loads(raw, parse_constant=lambda name: None)
    except RecursionError as error:
        raise Malformed("nested too deeply") from error
    except UnicodeError as error:
        raise Malformed("not valid UTF-8") from error
    except ValueError as error:
        raise Malformed(f"not valid JSON: {error}") from error


def whole(text: str) -> str:
    """*text* with its surrogates joined to characters; a half without its partner is U+FFFD.

    JSON can write such halves (``"\\ud83d"``), and native code takes none. A request's are found with its body; but the
    arguments of a past call are JSON within a string, and what a template makes of them goes into a tokenizer.
    """
    if text.isascii() or _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@functools.cache
def _decoder(kind: Any) -> Any:
    return msgspec.json.Decoder(kind)
