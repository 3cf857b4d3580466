"""The three HTTP dialects the harness speaks: how a request is written, how its reply is counted and checked.

Tokens are counted by a marker in the raw bytes. A marker contains unescaped double quotes (or is an SSE `event:` line),
so it cannot occur inside a JSON string: a quote there is always preceded by a backslash. The spacing after the colon
differs between servers and is learnt from the first event that carries a token.
"""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks.client import Exchange

Prompt = str | list[int]
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
_TAIL = 6  # reads at the end of a reply that are searched for its finish reason and usage


class Dialect:
    """Base of all dialects; `markers` is the byte string that each token event has, and the one of an empty token."""

    path = ""
    _token = re.compile(rb"")
    _end = re.compile(rb"")
    _failure = re.compile(rb"")

    def __init__(self) -> None:
        self.markers: tuple[bytes, bytes] | None = None

    def body(self, model: str, prompt: Prompt, max_tokens: int, extra: dict[str, Any]) -> dict[str, Any]:
        """The request's JSON. `extra` wins over everything; an extra of None removes the field."""
        body = {"model": model, **self._prompt(prompt), "max_tokens": max_tokens, "stream": True, **extra}
        return {key: value for key, value in body.items() if value is not None}

    def learn(self, payload: bytes) -> tuple[bytes, bytes] | None:
        """Look for the first token event and remember how this server spells it."""
        found = self._token.search(payload)
        if found:
            self.markers = self._spell(found)
        return self.markers

    def finish(self, exchange: Exchange) -> str:
        """Settle the token count of a streamed reply; returns what is wrong with it, or an empty string."""
        tail = b"".join(exchange.blocks[-_TAIL:])
        usage = _COMPLETION_TOKENS.findall(tail)
        exchange.tokens = int(usage[-1]) if usage else exchange.events
        if self._failure.search(tail):
            return "error event"
        return "" if self._end.search(tail) else "truncated stream"

    def finish_plain(self, exchange: Exchange) -> str:
        """The same for a reply that is not a stream."""
        usage = _COMPLETION_TOKENS.findall(exchange.reply())
        exchange.tokens = int(usage[-1]) if usage else 0
        return "" if usage else "no usage in reply"

    def verify(self, exchange: Exchange) -> str:
        """Parse every event of the reply and check all that the protocol promises."""
        events = list(parse_events(exchange.reply()))
        try:
            problem = self._verify(events, exchange)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return f"malformed event: {error!r}"
        if not problem and exchange.expected_tokens and exchange.tokens != exchange.expected_tokens:
            return f"{exchange.tokens} tokens instead of {exchange.expected_tokens}"
        return problem

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        return {"prompt": prompt}

    def _spell(self, found: re.Match[bytes]) -> tuple[bytes, bytes]:
        return found.group(), b""

    def _verify(self, events: list[dict[str, str]], exchange: Exchange) -> str:
        raise NotImplementedError


class Generate(Dialect):
    """Penstock's native `POST /v1/generate`."""

    path = "/v1/generate"
    _token = re.compile(rb"event: ?token\r?\n")
    _end = re.compile(rb"event: ?done\r?\n")
    _failure = re.compile(rb"event: ?error\r?\n")

    def _verify(self, events: list[dict[str, str]], exchange: Exchange) -> str:
        if not events or events[-1]["event"] != "done":
            return "the stream does not end with done"
        attempt = 0
        for position, event in enumerate(events, 1):
            if int(event["id"]) != position:
                return f"position {event['id']} where {position} is due"
            data = json.loads(event["data"])
            if position < len(events):
                if event["event"] != "token":
                    return f"{event['event']} event before the end"
                if data["attempt"] < attempt:
                    return f"attempt went back from {attempt} to {data['attempt']}"
                attempt = data["attempt"]
            elif data["usage"]["completion_tokens"] != position - 1:
                return f"usage says {data['usage']['completion_tokens']} for {position - 1} token events"
        return "" if exchange.events == len(events) - 1 else f"counted {exchange.events} of {len(events) - 1} tokens"


class Completions(Dialect):
    """OpenAI's `POST /v1/completions`; the prompt may be a list of token ids."""

    path = "/v1/completions"
    _field = "text"
    _token = re.compile(rb'"text": ?"')
    _end = re.compile(rb'"finish_reason": ?"')
    _failure = re.compile(rb'data: ?\{"error"')

    def _spell(self, found: re.Match[bytes]) -> tuple[bytes, bytes]:
        return found.group(), found.group() + b'"'

    def _text(self, choice: dict[str, Any]) -> str:
        return choice.get("text") or ""

    def _verify(self, events: list[dict[str, str]], exchange: Exchange) -> str:
        if events and events[-1]["data"] == "[DONE]":
            events = events[:-1]  # required of OpenAI's own API, but not every server sends it
        ids, finished, texts = set(), 0, 0
        for event in events:
            chunk = json.loads(event["data"])
            ids.add(chunk["id"])
            for choice in chunk["choices"]:
                if finished:
                    return "a choice after the finish reason"
                texts += bool(self._text(choice))
                finished += choice.get("finish_reason") is not None
        if len(ids) != 1:
            return f"{len(ids)} ids in one reply"
        if finished != 1:
            return f"{finished} finish reasons"
        return "" if texts == exchange.events else f"counted {exchange.events} of {texts} text events"


class Chat(Completions):
    """OpenAI's `POST /v1/chat/completions`."""

    path = "/v1/chat/completions"
    _token = re.compile(rb'"content": ?"')

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        if not isinstance(prompt, str):
            raise ValueError("chat takes text prompts, not token ids: choose another dialect or --prompts text")
        return {"messages": [{"role": "user", "content": prompt}]}

    def _text(self, choice: dict[str, Any]) -> str:
        return choice["delta"].get("content") or ""


DIALECTS: dict[str, type[Dialect]] = {"generate": Generate, "completions": Completions, "chat": Chat}


def parse_events(stream: bytes) -> list[dict[str, str]]:
    """All dispatched events of an SSE stream as `{event, id, data}` (WHATWG rules, less the BOM)."""
    events = []
    for block in re.split(r"\r?\n\r?\n", stream.decode()):
        event = {"event": "message", "id": "", "data": ""}
        data = []
        for line in re.split(r"\r?\n", block):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                data.append(value)
            elif name in ("event", "id"):
                event[name] = value
        if data:
            events.append(event | {"data": "\n".join(data)})
    return events
