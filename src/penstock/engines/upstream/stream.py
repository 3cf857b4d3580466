"""What comes down an OpenAI-compatible stream: lines, chunks, and the tokens in them. The hot path.

A chunk is read as what it has to be (`Chunk`). One that is something else is read once more, and slowly, for whatever
can be made of it (`_forgiving`): servers differ, and what is not needed must not cost a reply.
"""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from penstock.core.events import Logprob, Prefix, TopLogprob
from penstock.core.foreign import Malformed, decode, loads, whole
from penstock.core.job import Request
from penstock.core.ports import Output
from penstock.core.tools import finish_reason

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


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class ToolDelta(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None
    name: str | None = None
    """In place of the function's, at some."""
    arguments: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    tool_calls: list[ToolDelta] | None = None
    function_call: _Function | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    message: _Delta | None = None
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


class _Timings(msgspec.Struct, gc=False):
    """llama.cpp's, which count: ``predicted_n`` tokens so far, ``prompt_n`` + ``cache_n`` of the prompt."""

    prompt_n: int = 0
    cache_n: int = 0
    predicted_n: int = 0


class Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: TokenCounts | None = None
    timings: _Timings | None = None
    prompt_token_ids: list[int] | None = None
    error: Any = None


class _Token(msgspec.Struct, rename={"values": "bytes"}):
    token: str = ""
    logprob: float | None = None
    id: int = UNKNOWN_ID
    values: list[int] | None = None
    """Of its bytes."""
    top_logprobs: list[_Token] = []

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


class _Logprobs(msgspec.Struct):
    """Chat's form (``content``; llama.cpp has it everywhere) and that of completions (the others)."""

    content: list[_Token] | None = None
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None

    def all(self) -> list[_Token]:
        if self.content is not None:
            return self.content
        tops: list[dict[str, float] | None] = self.top_logprobs or [None] * len(self.tokens)
        return [
            _Token(text, logprob, top_logprobs=[_Token(each, value) for each, value in (top or {}).items()])
            for text, logprob, top in zip(self.tokens, self.token_logprobs, tops, strict=False)
        ]


def read_chunk(payload: bytes) -> Chunk:
    """Raises `Malformed` for what is no chunk at all."""
    try:
        return decode(payload, Chunk)
    except Malformed:
        return _forgiving(loads(payload))


def read_logprobs(raw: msgspec.Raw) -> list[_Token]:
    """Raises `Malformed`."""
    try:
        found: _Logprobs | None = decode(raw, _Logprobs | None)  # type: ignore[arg-type]
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


def _forgiving_choice(given: dict[str, Any]) -> _Choice:
    reason = given.get("finish_reason")
    if isinstance(reason, dict):
        reason = reason.get("type")
    return _Choice(
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


def _forgiving_delta(value: Any) -> _Delta | None:
    if value is None:
        return None
    given = _object(value)
    calls = given.get("tool_calls") or []
    function = given.get("function_call")
    return _Delta(
        _text(given.get("content")),
        [_forgiving_call(_object(each)) for each in (calls if isinstance(calls, list) else [calls])],
        None if function is None else _forgiving_function(function),
    )


def _forgiving_call(given: dict[str, Any]) -> ToolDelta:
    id, index = given.get("id"), as_count(given.get("index"))
    return ToolDelta(index, None if id is None else str(id), _forgiving_function(given.get("function") or given))


def _forgiving_function(value: Any) -> _Function:
    given = _object(value)
    name, arguments = given.get("name"), given.get("arguments")
    if arguments is not None and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return _Function(name if isinstance(name, str) else None, arguments)


def _forgiving_logprobs(value: Any) -> list[_Token]:
    if value is None:
        return []
    given = _object(value)
    if (content := given.get("content")) is not None:
        return [_forgiving_token(each) for each in _list(content)]
    tokens, logprobs, tops = (_list(given.get(name)) for name in ("tokens", "token_logprobs", "top_logprobs"))
    tops = [
        [_Token(whole(_text(text) or ""), _number(number)) for text, number in top.items()]
        if isinstance(top, dict)
        else []
        for top in tops or [None] * len(tokens)
    ]
    return [
        _Token(whole(_text(text) or ""), _number(number), top_logprobs=top)
        for text, number, top in zip(tokens, logprobs, tops, strict=False)
    ]


def _forgiving_token(value: Any) -> _Token:
    given = _object(value)
    id = as_count(given.get("id"))
    return _Token(
        whole(_text(given.get("token")) or ""),
        _number(given.get("logprob")),
        UNKNOWN_ID if id is None else id,
        _ids(given.get("bytes")),
        [_forgiving_token(each) for each in _list(given.get("top_logprobs"))],
    )


def read_usage(value: Any) -> TokenCounts | None:
    """What it counts, as far as that can be read."""
    return TokenCounts(**counts) if (counts := _counts(value, TokenCounts)) else None


def _counts(value: Any, kind: type[msgspec.Struct]) -> dict[str, int]:
    """The fields of *kind* that *value* has, where they are numbers that count."""
    given = value if isinstance(value, dict) else {}
    counts = {name: as_count(given.get(name)) for name in kind.__struct_fields__}
    return {name: count for name, count in counts.items() if count is not None}


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


# ------------------------------------------------------------------------------------------ one choice's reply


class _CallInPieces:
    """A call as it comes, piece by piece."""

    def __init__(self, index: int | None, id: str | None) -> None:
        self.index = index
        self.id = id
        self.name = ""
        self.arguments = ""

    @property
    def complete(self) -> bool:
        return _is_object(self.arguments)


class UpstreamReply:
    """One choice of a request, over all the calls that it takes.

    ``ids`` and ``texts`` are what the log has of it: those of an earlier attempt (*prefix*), and all that `take` gave.
    ``finish`` is None until it has ended.
    """

    def __init__(self, key: int, choice: int | None, prefix: Prefix, request: Request) -> None:
        self.key = key
        self.choice = choice
        """None where it is the only one."""
        self.ids = list(prefix.ids)
        self.texts = list(prefix.texts)
        self.limit = request.sampling.max_tokens
        self.prompt_ids: list[int] | None = None
        """Where a server told them."""
        self.prompt_tokens: int | None = None
        self.finish: str | None = "length" if len(self.ids) >= self.limit else None
        self.stop: str | None = None
        """The stop string that ended it, where one did and the server told which."""
        self._request = request
        self._logprobs = request.sampling.logprobs
        self.begin()

    def begin(self) -> None:
        """Another call begins, behind what is logged."""
        self._before = len(self.ids)
        self._sent = self._before if any(self.texts) else 0  # tokens of the reply in the prompt: it begins anew without
        self._text = ""  # that came without a token
        self._half = ""  # of a character, whose other half comes with the next chunk
        self._calls: list[_CallInPieces] = []
        self._reason: str | None = None
        self._usage: TokenCounts | None = None

    @property
    def has_unknown_ids(self) -> bool:
        """Is there a token of which only the text is known?"""
        return UNKNOWN_ID in self.ids

    def take(self, payloads: list[bytes]) -> tuple[Output, Any, bool]:
        """What these events bring: an output (perhaps empty), an error behind it (a `StreamError`, or one that the
        server told), and: was it the end?

        Where several tokens came with one text, it is the last one's.
        """
        output = Output(self.key, [], [])
        entries: list[Logprob | None] = []
        for payload in payloads:
            if payload.strip() == b"[DONE]":
                return self._output(output, entries), None, True
            try:
                chunk = read_chunk(payload)
                failure = self._take(chunk, output, entries)
            except Malformed as error:
                failure = StreamError(f"a chunk that cannot be read ({error})")
            except StreamError as error:
                failure = error
            if failure is not None and not self.ended:  # else it is complete, whatever comes behind
                return self._output(output, entries), failure, False
        return self._output(output, entries), None, False

    def _take(self, chunk: Chunk, output: Output, entries: list[Logprob | None]) -> Any:
        """Add what *chunk* brings to *output* and *entries*; the failure that it tells, if it does."""
        if chunk.error:
            return chunk.error
        if chunk.usage is not None:
            self._usage = chunk.usage
        if self.prompt_ids is None and chunk.prompt_token_ids:
            self._learn_prompt(chunk.prompt_token_ids)
        for choice in chunk.choices:
            if choice.prompt_token_ids and self.prompt_ids is None:
                self._learn_prompt(choice.prompt_token_ids)
            text, calls = choice.text or "", False
            if (delta := choice.delta or choice.message) is not None:
                text = delta.content or ""
                if delta.tool_calls or delta.function_call:
                    calls = True
                    self._hear(delta)
            if (ids := choice.token_ids) is None:
                if (timings := chunk.timings) is not None:
                    had = len(self.ids) + len(output.ids)
                    new = min(timings.predicted_n - (had - self._before), self.limit - had)
                    if self.prompt_tokens is None:
                        self.prompt_tokens = timings.prompt_n + timings.cache_n - self._sent
                        output.prompt_tokens = self.prompt_tokens
                else:
                    new = 1 if text or calls else 0
                ids = [UNKNOWN_ID] * new
            text = self._joined(text)
            reason = (choice.finish_reason or "").lower()
            if reason and reason not in FAILURES:
                text += self._written(any(self.texts) or any(output.texts) or bool(self._text + text))
                self._reason = REASONS.get(reason, "stop")
                stop = choice.stop_reason or choice.matched_stop
                self.stop = whole(stop) if isinstance(stop, str) else None
            if self._logprobs is not None:
                ids, texts = self._with_logprobs(choice.logprobs, ids, text, entries)
                output.ids += ids
                output.texts += texts
            elif len(ids) == 1 and not self._text:
                output.ids.append(ids[0])
                output.texts.append(text)
            elif ids:
                output.ids += ids
                output.texts += [""] * (len(ids) - 1)
                output.texts.append(self._text + text)
                self._text = ""
            else:
                self._text += text
            if reason in FAILURES:
                return f"it gave the reply up (finish_reason {reason!r})"
        return None

    def _joined(self, text: str) -> str:
        """*text* in whole characters: half a surrogate at its end waits for the other half."""
        if text and self._half:
            text, self._half = self._half + text, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return whole(text)

    def _output(self, output: Output, entries: list[Logprob | None]) -> Output:
        self.ids += output.ids
        self.texts += output.texts
        if self._logprobs is not None:
            output.logprobs = entries
        if self.choice is not None:
            output.choices = [self.choice] * len(output.ids)
        if self.prompt_ids is not None and self.prompt_tokens is None:
            self.prompt_tokens = output.prompt_tokens = len(self.prompt_ids)
        return output

    def _learn_prompt(self, ids: list[int]) -> None:
        if not self._sent:  # else it has the reply's beginning behind it
            self.prompt_ids = ids

    @property
    def ended(self) -> bool:
        """Did the server say how it ended?"""
        return self._reason is not None

    def end(self) -> Output:
        """The last output: tokens that were counted but never came by themselves, and why it ended."""
        output = Output(self.key, [], [])
        usage = self._usage
        if usage is not None:
            counted = usage.completion_tokens or 0
            missing = min(counted - (len(self.ids) - self._before), self.limit - len(self.ids))
            output.ids = [UNKNOWN_ID] * missing
            output.texts = [""] * missing
            if self.prompt_tokens is None and usage.prompt_tokens is not None:
                self.prompt_tokens = output.prompt_tokens = max(0, usage.prompt_tokens - self._sent)
        if text := self._text + whole(self._half):
            if not output.ids:
                output.ids, output.texts = [UNKNOWN_ID], [""]
            output.texts[0] = text
        last = self._output(output, [None] * len(output.ids))
        # By the log, which is all that anybody sees: some say "stop" after a call, or tell of calls without any.
        reason = self._reason or "stop"
        self.finish = finish_reason(self._request, "stop" if reason == "tool_calls" else reason, "".join(self.texts))
        return last

    def _with_logprobs(
        self, raw: msgspec.Raw, ids: list[int], text: str, entries: list[Logprob | None]
    ) -> tuple[list[int], list[str]]:
        """Ids and texts of a chunk; its log-probabilities go to *entries*."""
        tokens = read_logprobs(raw)
        if len(tokens) > len(ids) or UNKNOWN_ID in ids:
            ids = [token.id for token in tokens] or ids
        if not ids:
            self._text += text
            return [], []
        texts = [""] * (len(ids) - 1) + [self._text + text]
        if len(tokens) == len(ids) and not self._text and "".join(token.token for token in tokens) == text:
            texts = [token.token for token in tokens]
        self._text = ""
        entries += [None] * (len(ids) - len(tokens))
        entries += [self._entry(id, token) for id, token in zip(ids[len(ids) - len(tokens) :], tokens, strict=True)]
        return ids, texts

    def _entry(self, id: int, token: _Token) -> Logprob:
        """What the server told of a token, whose *id* is known where those of the alternatives are not."""
        chosen = TopLogprob(id, token.token, token.logprob or 0.0, token.data)
        top = []
        for each in token.top_logprobs:
            other = TopLogprob(each.id, each.token, NEVER if each.logprob is None else each.logprob, each.data)
            same = (other.text, other.logprob, other.data) == (chosen.text, chosen.logprob, chosen.data)
            top.append(chosen if same and each.id in (UNKNOWN_ID, id) and chosen not in top else other)
        if self._logprobs and chosen not in top:
            top.append(chosen)
        return Logprob(chosen.logprob, tuple(top), chosen.text, chosen.data)

    # ---------------------------------------------------------------------------- tool calls, as models write them

    def _hear(self, delta: _Delta) -> None:
        """Calls, or pieces of them, in any of the forms that are about."""
        deltas = delta.tool_calls or []
        if delta.function_call is not None:
            deltas = [ToolDelta(0, None, delta.function_call)]
        for place, each in enumerate(deltas):
            index = each.index if each.index is not None or len(deltas) == 1 else place
            function = each.function or _Function(each.name, each.arguments)
            call = self._call(index, each.id, function)
            call.name += function.name if function.name and function.name != call.name else ""
            call.arguments += function.arguments or ""

    def _call(self, index: int | None, id: str | None, function: _Function) -> _CallInPieces:
        """Which call a piece is of: that with its *index*, or the last one; but not if it is another by its *id*, or
        has a name where one is complete."""
        found = next((call for call in reversed(self._calls) if index in (None, call.index)), None)
        if found is not None:
            if id and found.id:
                other = id != found.id
            else:
                other = (
                    bool(function.name) and found.complete and bool(function.arguments or function.name != found.name)
                )
            if not other:
                found.id = found.id or id
                return found
        self._calls.append(_CallInPieces(index, id))
        return self._calls[-1]

    def _written(self, behind: bool) -> str:
        """All calls, as the log has them (see `penstock.core.tools`); *behind* a text. Raises `StreamError`."""
        tools = self._request.callable_tools
        if not tools:
            return ""  # nobody asked for any
        blocks = []
        for call in self._calls:
            name, arguments = whole(call.name), whole(call.arguments) or "{}"
            if not name and len(tools) == 1:
                name = tools[0].name
            if not name:
                raise StreamError("a call that names no tool")
            if not (_is_object(arguments) and any(tool.name == name for tool in tools)):
                arguments = _string(arguments)
            blocks.append(f'<tool_call>\n{{"name": {_string(name)}, "arguments": {arguments}}}\n</tool_call>')
        return ("\n" if behind and blocks else "") + "\n".join(blocks)


def _is_object(text: str) -> bool:
    try:
        return isinstance(decode(text, dict), dict)
    except Malformed:
        return False


def _string(text: str) -> str:
    return msgspec.json.encode(text).decode()
