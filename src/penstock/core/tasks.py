"""The log of a job that does another task than to generate. It is a log like any other, but its texts are not prose.

==========  ========================================================================================================
embed       an entry for each input, in any order: its id is the input's index (from 0), its text the vector
tokenize    one entry: its text is a `Tokenized` as JSON
score       an entry for each token of the prompt: its id, the text that it adds, and its log-probability after what
            comes before it (the first one has none)
==========  ========================================================================================================
"""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Sequence

import msgspec

from penstock.core.events import Completion


class Tokenized(msgspec.Struct, frozen=True):
    """A prompt's token ids, the name of each in the vocabulary (None if an upstream server does not report names), and
    the text that they stand for, with special tokens spelled out."""

    tokens: list[int]
    token_strs: list[str] | None
    text: str

    def encode(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def of(cls, completion: Completion) -> Tokenized:
        return msgspec.json.decode(completion.texts[0], type=cls)


def vector_text(vector: Sequence[float]) -> str:
    """A vector in the form of the log, which is OpenAI's ``encoding_format: base64``: float32, little-endian."""
    return base64.b64encode(_little_endian(array.array("f", vector)).tobytes()).decode()


def vector_values(text: str) -> list[float]:
    """The numbers in a text that `vector_text` made."""
    return _little_endian(array.array("f", base64.b64decode(text))).tolist()


def vectors(completion: Completion) -> list[str]:
    """The vectors of an embedding's folded log, in the order of its inputs."""
    (ids,), (texts,) = completion.ids, completion.pieces
    return [text for _, text in sorted(zip(ids, texts, strict=True))]


def _little_endian(values: array.array[float]) -> array.array[float]:
    if sys.byteorder == "big":
        values.byteswap()
    return values
