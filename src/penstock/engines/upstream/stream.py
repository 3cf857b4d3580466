"""What comes down an OpenAI-compatible stream: lines and chunks. The hot path.

A chunk is read as what it has to be (`Chunk`). One that is something else is read once more, and slowly, for whatever
can be made of it (`_forgiving`): servers differ, and what is not needed must not cost a reply.
"""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from penstock.core.foreign import Malformed, decode, loads, whole

#: Bytes that one line of a stream may have.
MAX_LINE = 1 << 20
#: The id of a token that the server did not tell.
UNKNOWN_ID = -1
#: The log-probability of an alternative that the server calls impossible: JSON has no infinity.
NEVER = -9999.0
#: What servers call the ends of a reply, beside "stop"; what is not here is one.
REASONS = {
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "tool_use": "tool_calls",
    "content_filter": "content_filter",
    "safety": "content_filter",
}
#: Ends that are none: the server gave up.
FAILURES = frozenset({"error", "abort", "aborted", "cancelled"})


class StreamError(Exception):
    """What came is no stream of the API: the server is broken, or it is no such server."""


class Lines:
    """Server-sent events, as these servers write them (an event's data is one line), from reads of any size."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that are complete. Raises `StreamError` for a line without an end."""
        lines = data.split(b"\n")
        if self._rest:
            lines[0] = self._rest + lines[0]
        self._rest = lines.pop()
        if len(self._rest) > MAX_LINE:
            raise StreamError(f"a line of more than {MAX_LINE} bytes")
        return [line[5:] for line in lines if line[:5] == b"data:"]


# ------------------------------------------------------------------------------------------ chunks


class Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class ToolDelta(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: Function | None = None
    name: str | None = None
    """In place of the function's, at some."""
    arguments: str | None = None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """The same; some servers say both."""
    tool_calls: list[ToolDelta] | None = None
    function_call: Function | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    message: Delta | None = None
    """The whole reply, where the server does not stream."""
    finish_reason: str | None = None
    stop_reason: Any = None
    """vLLM's: the stop string that ended it, or a token's id."""
    matched_stop: Any = None
    """SGLang's name for it."""
    logprobs: msgspec.Raw = msgspec.Raw(b"null")
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class TokenCounts(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Any = None
    completion_tokens_details: Any = None
    prompt_cache_hit_tokens: int | None = None
    """DeepSeek's."""

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, as far as it is told."""
        return _count_in(self.prompt_tokens_details, "cached_tokens") or self.prompt_cache_hit_tokens or 0

    @property
    def reasoning_tokens(self) -> int:
        """Of the completion, as far as it is told."""
        return _count_in(self.completion_tokens_details, "reasoning_tokens")


class _Timings(msgspec.Struct, gc=False):
    """llama.cpp's, which count: ``predicted_n`` tokens so far, ``prompt_n`` + ``cache_n`` of the prompt."""

    prompt_n: int = 0
    cache_n: int = 0
    predicted_n: int = 0


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: TokenCounts | None = None
    timings: _Timings | None = None
    prompt_token_ids: list[int] | None = None
    error: Any = None


class Token(msgspec.Struct, rename={"values": "bytes"}):
    token: str = ""
    logprob: float | None = None
    id: int = UNKNOWN_ID
    values: list[int] | None = None
    """Of its bytes."""
    top_logprobs: list[Token] = []

    @property
    def data(self) -> bytes | None:
        """Its bytes, where they are not those of its text."""
        if self.values is None:
            return None
        try:
            data = bytes(self.values)
        except ValueError:
            return None
        return None if data == self.token.encode() else data


class Logprobs(msgspec.Struct):
    """Chat's form (``content``; llama.cpp has it everywhere) and that of completions (the others)."""

    content: list[Token] | None = None
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None

    def all(self) -> list[Token]:
        if self.content is not None:
            return self.content
        tops: list[dict[str, float] | None] = self.top_logprobs or [None] * len(self.tokens)
        return [
            Token(text, logprob, top_logprobs=[Token(each, value) for each, value in (top or {}).items()])
            for text, logprob, top in zip(self.tokens, self.token_logprobs, tops, strict=False)
        ]


def read_chunk(payload: bytes) -> Chunk:
    """Raises `Malformed` for what is no chunk at all."""
    try:
        return decode(payload, Chunk)
    except Malformed:
        return _forgiving(loads(payload))


def read_logprobs(raw: msgspec.Raw) -> list[Token]:
    """Raises `Malformed`."""
    try:
        found: Logprobs | None = decode(raw, Logprobs | None)  # type: ignore[arg-type]
        return found.all() if found is not None else []
    except Malformed:
        return _forgiving_logprobs(loads(bytes(raw)))


# What can be made of JSON that is not as it has to be: what is needed must be there, the rest may be anything.


def _forgiving(value: Any) -> Chunk:
    given = _object(value)
    choices = given.get("choices") or []
    if not isinstance(choices, list):
        raise Malformed("without a list of choices")
    return Chunk(
        [_forgiving_choice(_object(each)) for each in choices],
        read_usage(given.get("usage")),
        _Timings(**counts) if "predicted_n" in (counts := _counts(given.get("timings"), _Timings)) else None,
        _ids(given.get("prompt_token_ids")),
        given.get("error"),
    )


def _forgiving_choice(given: dict[str, Any]) -> Choice:
    reason = given.get("finish_reason")
    if isinstance(reason, dict):
        reason = reason.get("type")
    return Choice(
        _text(given.get("text")),
        _forgiving_delta(given.get("delta")),
        _forgiving_delta(given.get("message")),
        finish_reason=reason if isinstance(reason, str) else None,
        stop_reason=given.get("stop_reason"),
        matched_stop=given.get("matched_stop"),
        logprobs=msgspec.Raw(json.dumps(given.get("logprobs")).encode()),
        token_ids=_ids(given.get("token_ids")),
        prompt_token_ids=_ids(given.get("prompt_token_ids")),
    )


def _forgiving_delta(value: Any) -> Delta | None:
    if value is None:
        return None
    given = _object(value)
    calls = given.get("tool_calls") or []
    function = given.get("function_call")
    content = given.get("content")
    return Delta(
        _text(content),
        _text_or_none(given.get("reasoning")) or _thoughts_among(content),
        _text_or_none(given.get("reasoning_content")),
        [_forgiving_call(_object(each)) for each in (calls if isinstance(calls, list) else [calls])],
        None if function is None else _forgiving_function(function),
    )


def _forgiving_call(given: dict[str, Any]) -> ToolDelta:
    id, index = given.get("id"), as_count(given.get("index"))
    return ToolDelta(index, None if id is None else str(id), _forgiving_function(given.get("function") or given))


def _forgiving_function(value: Any) -> Function:
    given = _object(value)
    name, arguments = given.get("name"), given.get("arguments")
    if arguments is not None and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Function(name if isinstance(name, str) else None, arguments)


def _forgiving_logprobs(value: Any) -> list[Token]:
    if value is None:
        return []
    given = _object(value)
    if (content := given.get("content")) is not None:
        return [_forgiving_token(each) for each in _list(content)]
    tokens, logprobs, tops = (_list(given.get(name)) for name in ("tokens", "token_logprobs", "top_logprobs"))
    tops = [
        [Token(whole(_text(text) or ""), _number(number)) for text, number in top.items()]
        if isinstance(top, dict)
        else []
        for top in tops or [None] * len(tokens)
    ]
    return [
        Token(whole(_text(text) or ""), _number(number), top_logprobs=top)
        for text, number, top in zip(tokens, logprobs, tops, strict=False)
    ]


def _forgiving_token(value: Any) -> Token:
    given = _object(value)
    id = as_count(given.get("id"))
    return Token(
        whole(_text(given.get("token")) or ""),
        _number(given.get("logprob")),
        UNKNOWN_ID if id is None else id,
        _ids(given.get("bytes")),
        [_forgiving_token(each) for each in _list(given.get("top_logprobs"))],
    )


def read_usage(value: Any) -> TokenCounts | None:
    """What it counts, as far as that can be read."""
    if not (counts := _counts(value, TokenCounts)):
        return None
    details = {name: value.get(name) for name in ("prompt_tokens_details", "completion_tokens_details")}
    return TokenCounts(**counts, **details)


def _counts(value: Any, kind: type[msgspec.Struct]) -> dict[str, int]:
    """The fields of *kind* that *value* has, where they are numbers that count."""
    given = value if isinstance(value, dict) else {}
    counts = {name: as_count(given.get(name)) for name in kind.__struct_fields__}
    return {name: count for name, count in counts.items() if count is not None}


def _count_in(details: Any, name: str) -> int:
    return (as_count(details.get(name)) or 0) if isinstance(details, dict) else 0


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"{type(value).__name__} where an object is due")
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    """A text, or the texts among the parts of a content."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Malformed(f"{type(value).__name__} where a text is due")
    parts = [part.get("text") if isinstance(part, dict) else part for part in value]
    return "".join(part for part in parts if isinstance(part, str))


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _thoughts_among(content: Any) -> str:
    """The thoughts among the parts of a content (Mistral's)."""
    return "".join(
        _text(part["thinking"]) or "" for part in _list(content) if isinstance(part, dict) and "thinking" in part
    )


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None


def as_count(value: Any) -> int | None:
    """A whole number of a size that something can have, perhaps written as a float."""
    return int(value) if _is_number(value) and 0 <= value < 2**31 and value == int(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ids(value: Any) -> list[int] | None:
    found = [as_count(each) for each in value] if isinstance(value, list) else [None]
    return None if None in found else found  # type: ignore[return-value]
