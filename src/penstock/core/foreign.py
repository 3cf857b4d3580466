"""JSON from outside, which may be anything at all.

Readers handle one error, `Malformed`. msgspec raises four: its own, `UnicodeDecodeError` (bytes that are not UTF-8),
`UnicodeEncodeError` (half a surrogate in a `str`) and `RecursionError` (nested too deeply).
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
    """The input is not what it has to be. The message completes "it is …"."""


class Mismatch(Malformed):
    """The input is JSON, but not of the type that it has to be. The message is msgspec's, with the place."""


def decode(raw: bytes | bytearray | memoryview | str, kind: type[T]) -> T:
    """Decode *raw* as a *kind*. Raises only `Malformed`."""
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
    """Decode *raw* as leniently as possible: halves of surrogates stay (`whole` joins them); NaN and infinity, which
    servers in Python write, become None. Raises only `Malformed`."""
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

    JSON can contain such halves (``"\\ud83d"``), but native code does not accept them. The check of a request's body
    finds its own, but the arguments of a past call are JSON within a string, and a template passes them to a tokenizer.
    """
    if text.isascii() or _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@functools.cache
def _decoder(kind: Any) -> Any:
    return msgspec.json.Decoder(kind)
