"""What comes down an OpenAI-compatible stream: lines, chunks, and the tokens in them. The hot path."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.core.events import Logprob, Prefix, TopLogprob
from penstock.core.ports import Output

#: Bytes that one line of a stream may have.
MAX_LINE = 1 << 20
#: The id of a token that the server did not tell.
UNTOLD = -1


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
    index: int = 0
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    tool_calls: list[ToolDelta] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    stop_reason: Any = None
    """vLLM's: the stop string that ended it, or a token's id."""
    matched_stop: Any = None
    """SGLang's name for it."""
    logprobs: msgspec.Raw = msgspec.Raw(b"null")
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Timings(msgspec.Struct, gc=False):
    """llama.cpp's, which count: ``predicted_n`` tokens so far, ``prompt_n`` + ``cache_n`` of the prompt."""

    prompt_n: int = 0
    cache_n: int = 0
    predicted_n: int = 0


class Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    timings: _Timings | None = None
    prompt_token_ids: list[int] | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(Chunk).decode


class _Token(msgspec.Struct):
    token: str = ""
    logprob: float = 0.0
    id: int = UNTOLD
    top_logprobs: list[_Token] = []


class _Logprobs(msgspec.Struct):
    """Chat's form (``content``; llama.cpp has it everywhere) and that of completions (the others)."""

    content: list[_Token] | None = None
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


_logprobs = msgspec.json.Decoder(_Logprobs | None)


def _read_logprobs(raw: msgspec.Raw) -> list[_Token]:
    try:
        found: _Logprobs | None = _logprobs.decode(raw)
    except msgspec.MsgspecError as error:
        raise StreamError(f"logprobs that cannot be read ({error})") from error
    if found is None:
        return []
    if found.content is not None:
        return found.content
    tops: list[dict[str, float] | None] = found.top_logprobs or [None] * len(found.tokens)
    return [
        _Token(text, logprob or 0.0, UNTOLD, [_Token(each, value) for each, value in (top or {}).items()])
        for text, logprob, top in zip(found.tokens, found.token_logprobs, tops, strict=False)
    ]


# ------------------------------------------------------------------------------------------ one choice's reply


class Reply:
    """One choice of a request, over all the calls that it takes.

    ``ids`` and ``texts`` are what the log has of it: those of an earlier attempt (*prefix*), and all that `take` gave.
    ``finish`` is None until it has ended.
    """

    def __init__(self, key: int, choice: int | None, prefix: Prefix, limit: int, logprobs: bool) -> None:
        self.key = key
        self.choice = choice
        """None where it is the only one."""
        self.ids = list(prefix.ids)
        self.texts = list(prefix.texts)
        self.limit = limit
        self.prompt_ids: list[int] | None = None
        """Where a server told them."""
        self.prompt_tokens: int | None = None
        self.finish: str | None = "length" if len(self.ids) >= limit else None
        self.stop: str | None = None
        """The stop string that ended it, where one did and the server told which."""
        self._logprobs = logprobs
        self.begin()

    def begin(self) -> None:
        """Another call begins, behind what is logged."""
        self._before = len(self.ids)
        self._text = ""  # that came without a token
        self._tool: int | None = None
        self._called = False
        self._reason: str | None = None
        self._usage: Usage | None = None

    @property
    def untold(self) -> bool:
        """Is there a token of which only the text is known?"""
        return UNTOLD in self.ids

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
                chunk = _decode_chunk(payload)
            except msgspec.MsgspecError as error:
                broken = StreamError(f"a chunk that cannot be read ({error})")
                return self._output(output, entries), broken, False
            if chunk.error is not None:
                return self._output(output, entries), chunk.error, False
            if chunk.usage is not None:
                self._usage = chunk.usage
            if self.prompt_ids is None and chunk.prompt_token_ids:
                self._told_prompt(chunk.prompt_token_ids)
            for choice in chunk.choices:
                if choice.prompt_token_ids and self.prompt_ids is None:
                    self._told_prompt(choice.prompt_token_ids)
                text = choice.text
                if (delta := choice.delta) is not None:
                    text = delta.content
                    if delta.tool_calls:
                        text = (text or "") + self._call(delta.tool_calls)
                if choice.finish_reason is not None:
                    self._reason = choice.finish_reason
                    stop = choice.stop_reason or choice.matched_stop
                    self.stop = stop if isinstance(stop, str) else None
                    if self._tool is not None:
                        text = (text or "") + self._end_call()
                if (ids := choice.token_ids) is None:
                    if (timings := chunk.timings) is not None:
                        new = timings.predicted_n - (len(self.ids) + len(output.ids) - self._before)
                        if self.prompt_tokens is None:
                            self.prompt_tokens = timings.prompt_n + timings.cache_n - self._before
                            output.prompt_tokens = self.prompt_tokens
                    else:
                        new = 1 if text else 0
                    ids = [UNTOLD] * new
                text = text or ""
                if self._logprobs:
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
        return self._output(output, entries), None, False

    def _output(self, output: Output, entries: list[Logprob | None]) -> Output:
        self.ids += output.ids
        self.texts += output.texts
        if self._logprobs:
            output.logprobs = entries
        if self.choice is not None:
            output.choices = [self.choice] * len(output.ids)
        if self.prompt_ids is not None and self.prompt_tokens is None:
            self.prompt_tokens = output.prompt_tokens = len(self.prompt_ids)
        return output

    def _told_prompt(self, ids: list[int]) -> None:
        if not self._before:  # else it has the reply's beginning behind it
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
            missing = min(usage.completion_tokens - (len(self.ids) - self._before), self.limit - len(self.ids))
            output.ids = [UNTOLD] * missing
            output.texts = [""] * missing
            if self.prompt_tokens is None:
                self.prompt_tokens = output.prompt_tokens = max(0, usage.prompt_tokens - self._before)
        if self._text:
            if not output.ids:
                output.ids, output.texts = [UNTOLD], [""]
            output.texts[0] = self._text
        self.finish = self._reason if self._reason in ("length", "tool_calls") else "stop"
        if self._called and self.finish == "stop":
            self.finish = "tool_calls"  # a call by name ends with "stop" at some servers
        return self._output(output, [None] * len(output.ids))

    def _with_logprobs(
        self, raw: msgspec.Raw, ids: list[int], text: str, entries: list[Logprob | None]
    ) -> tuple[list[int], list[str]]:
        """Ids and texts of a chunk; its log-probabilities go to *entries*."""
        tokens = _read_logprobs(raw)
        if len(tokens) > len(ids) or UNTOLD in ids:
            ids = [token.id for token in tokens] or ids
        if not ids:
            self._text += text
            return [], []
        texts = [""] * (len(ids) - 1) + [self._text + text]
        if len(tokens) == len(ids) and not self._text and "".join(token.token for token in tokens) == text:
            texts = [token.token for token in tokens]
        self._text = ""
        entries += [None] * (len(ids) - len(tokens))
        for id, token in zip(ids[len(ids) - len(tokens) :], tokens, strict=True):
            # Alternatives come as texts; the chosen one's id is known.
            top = tuple(
                TopLogprob(id if each.id == UNTOLD and each.token == token.token else each.id, each.token, each.logprob)
                for each in token.top_logprobs
            )
            entries.append(Logprob(token.logprob, top))
        return ids, texts

    # ---------------------------------------------------------------------------- tool calls, as models write them

    def _call(self, deltas: list[ToolDelta]) -> str:
        text = ""
        for delta in deltas:
            function = delta.function or _Function()
            if delta.index != self._tool:
                if self._tool is not None:
                    text += self._end_call()
                separator = "\n" if text or self.ids else ""
                name = msgspec.json.encode(function.name or "").decode()
                text += f'{separator}<tool_call>\n{{"name": {name}, "arguments": '
                self._tool, self._arguments, self._called = delta.index, False, True
            if function.arguments:
                text += function.arguments
                self._arguments = True
        return text

    def _end_call(self) -> str:
        self._tool = None
        return ("" if self._arguments else "{}") + "}\n</tool_call>"
