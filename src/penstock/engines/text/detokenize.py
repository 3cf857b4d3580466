"""Token ids into text, as they come."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: character → byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


class Detokenizer(Protocol):
    """Token ids in, text out: joined, ``push``es and one final ``flush`` give what decoding all ids at once gives.

    Half a character is never given out; bytes that can no longer become one are U+FFFD.
    """

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class ByteLevelDetokenizer:
    """Each token is a run of bytes; the text is their UTF-8 decoding."""

    __slots__ = ("_data", "_held", "_texts")

    def __init__(self, texts: list[str | None], data: list[bytes]) -> None:
        self._texts = texts  # by id: the text of tokens that are whole characters, else None
        self._data = data
        self._held = b""  # the beginning of a character

    def push(self, token: int) -> str:
        if not self._held and (text := self._texts[token]) is not None:
            return text
        data = self._held + self._data[token]
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def flush(self) -> str:
        text = self._held.decode("utf-8", "replace")
        self._held = b""
        return text


class ByteFallbackDetokenizer:
    """SentencePiece style: tokens are text, except byte tokens ``<0x00>`` … ``<0xFF>``.

    A run of byte tokens is decoded as a whole when it ends: if it is not UTF-8, every byte of it becomes U+FFFD. That
    is what the decoder of ``tokenizers`` does, so nothing of a run can be given out before its end is known.
    """

    __slots__ = ("_data", "_run", "_strip", "_texts")

    def __init__(self, texts: list[str | None], data: list[bytes], strip: int) -> None:
        self._texts = texts  # by id: None for byte tokens
        self._data = data
        self._run = b""
        self._strip = strip  # how many leading spaces the decoder still takes off

    def push(self, token: int) -> str:
        text = self._texts[token]
        if text is None:
            self._run += self._data[token]
            return ""
        if not text:  # a special token: no text, and it does not end a run
            return ""
        if self._run:
            text = self._end_run() + text
        return self._stripped(text) if self._strip else text

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        for _ in range(self._strip):
            if not text:
                return ""
            if text[0] != " ":
                break
            self._strip -= 1
            text = text[1:]
        if text:
            self._strip = 0
        return text


class WindowDetokenizer:
    """Any other decoder: decode a sliding window of ids with and without its newest ones, and give the difference.

    The window starts a few tokens back, at the start of the text last given out, because decoders may treat the first
    token of a text in a special way.
    """

    __slots__ = ("_decode", "_given", "_ids")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._given = 0  # how many of the ids have had their text given out

    def push(self, token: int) -> str:
        self._ids.append(token)
        before, now = self._decode(self._ids[: self._given]), self._decode(self._ids)
        if len(now) <= len(before) or now.endswith(REPLACEMENT) or not now.startswith(before):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        before, now = self._decode(self._ids[: self._given]), self._decode(self._ids)
        self._given = len(self._ids)
        return now[len(before) :]
