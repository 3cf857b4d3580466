"""What makes a file the input of a batch: a request a line. Functions here block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from penstock.core.foreign import Malformed, Mismatch, decode
from penstock.core.job import ModelName

MAX_LINES = 50_000
#: Errors of an input that are told.
MAX_ERRORS = 100
#: What a line may have beside its body, in bytes.
MAX_ENVELOPE = 4096


class LineError(msgspec.Struct, frozen=True):
    """Why an input cannot be run. ``line`` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Line(msgspec.Struct, frozen=True):
    """One request of an input."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct, frozen=True):
    model: ModelName


class InputSummary(msgspec.Struct, frozen=True):
    """What an input has: how many lines, for which model (of which line), or why it cannot be run."""

    total: int = 0
    model: str | None = None
    line: int | None = None
    errors: list[LineError] = []


_MISSING = re.compile(r"missing required field `(\w+)`")
_AT = re.compile(r" - at `\$\.(\w+)")


def read_lines(path: Path, limit: int) -> Iterator[tuple[int, bytes]]:
    """(number, text) of every line that is not blank; of one that is longer than *limit* bytes, the beginning."""
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # some editors' mark at the beginning
            file.seek(0)
        number = 0
        while text := file.readline(limit + 1):
            number += 1
            rest = text if len(text) > limit else b""
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(1 << 20)
            if text and not text.isspace():
                yield number, text


def check_input(path: Path, endpoint: str, limit: int) -> InputSummary:
    """Read an input through and tell what is wrong with it. *limit*: bytes of a request's body."""
    errors: list[LineError] = []
    seen: set[str] = set()
    total, model, first = 0, None, None
    for number, text in read_lines(path, limit + MAX_ENVELOPE):
        total += 1
        if total > MAX_LINES:
            message = f"The file has more than {MAX_LINES} requests: make several batches of it."
            return InputSummary(errors=[LineError("too_many_tasks", message)])
        if len(errors) >= MAX_ERRORS:
            return InputSummary(errors=errors)
        if len(text) > limit + MAX_ENVELOPE:
            errors.append(LineError("request_too_large", f"The body may have {limit} bytes.", "body", number))
            continue
        line = _decode(text, number, errors)
        if line is None:
            continue
        if line.custom_id in seen:
            message = f"The custom_id {line.custom_id[:64]!r} is that of an earlier line, too."
            errors.append(LineError("duplicate_custom_id", message, "custom_id", number))
        seen.add(line.custom_id)
        if line.method != "POST":
            errors.append(LineError("invalid_method", "The method has to be POST.", "method", number))
        if line.url != endpoint:
            message = f"The url is not the batch's endpoint, {endpoint}."
            errors.append(LineError("url_mismatch", message, "url", number))
        wanted = _model_of(line, number, errors)
        if model is None:
            model, first = wanted, number
        elif wanted not in (None, model):
            message = f"The line is for another model than {model!r}: make a batch for each model."
            errors.append(LineError("model_mismatch", message, "body.model", number))
    if not total:
        errors.append(LineError("empty_file", "The file has no requests."))
    return InputSummary(errors=errors) if errors else InputSummary(total, model, first)


def decode_line(text: bytes) -> Line:
    """A line that has been checked."""
    return decode(text, Line)


def _decode(text: bytes, number: int, errors: list[LineError]) -> Line | None:
    try:
        return decode_line(text)
    except Mismatch as error:
        errors.append(_explain(str(error), number))
    except Malformed:
        errors.append(LineError("invalid_json_line", "The line is not valid JSON.", None, number))
    return None


def _model_of(line: Line, number: int, errors: list[LineError]) -> str | None:
    try:
        return decode(line.body, _Body).model
    except Mismatch as error:
        errors.append(_explain(str(error), number, "body"))
    except Malformed:
        errors.append(LineError("invalid_json_line", "The body is not valid JSON.", "body", number))
    return None


def _explain(message: str, number: int, where: str = "") -> LineError:
    """msgspec's words as OpenAI's: what is missing, or which field is not what it has to be."""
    prefix = f"{where}." if where else ""
    if (found := _MISSING.search(message)) is not None:
        param = prefix + found[1]
        return LineError("missing_required_parameter", f"Missing required parameter: {param}.", param, number)
    if (found := _AT.search(message)) is not None:
        param = prefix + found[1]
        return LineError("invalid_request", f"{param}: {message[: found.start()]}.", param, number)
    return LineError("invalid_request", f"{where or 'The line'} has to be a JSON object.", where or None, number)
