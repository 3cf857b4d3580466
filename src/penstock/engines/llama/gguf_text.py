"""The text side of a GGUF file for llama.cpp: prompts in pieces, and characters that came in several tokens."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer, decoders, models

from penstock.core.errors import ModelLoadError
from penstock.core.foreign import whole
from penstock.core.job import Request
from penstock.engines.text.detokenize import REPLACEMENT, Detokenizer, byte_level_alphabet
from penstock.engines.text.gguf import GgufFile, decoder_of
from penstock.engines.text.model import TextModel

#: An id for a token that llama.cpp did not tell: part of a character that never became one.
UNKNOWN_ID = -1


def _pieces(file: GgufFile) -> tuple[list[str], Any]:
    """What each token stands for, in the way that the decoder beside it reads."""
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.vocabulary == "rwkv":
        alphabet = {byte: char for char, byte in byte_level_alphabet().items()}
        return ["".join(alphabet[byte] for byte in _unescaped(token)) for token in file.tokens], decoders.ByteLevel()
    if file.vocabulary == "gemma4":
        return file.tokens, decoders.Sequence(spaces)
    if file.vocabulary == "plamo2":
        return file.tokens, decoders.Sequence(spaces[1:])
    if file.vocabulary == "t5":
        return file.tokens, decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    if file.vocabulary == "bert":
        raise ModelLoadError(
            f"{file.path} is an encoder, which llama.cpp is not asked for here: serve the model's folder with the "
            "engine openvino or transformers."
        )
    return file.tokens, decoder_of(file)


_ESCAPES = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def _unescaped(token: str) -> bytes:
    """Tokens of RWKV are any bytes, written as in a string of C."""

    def byte(match: re.Match[bytes]) -> bytes:
        number, char = match.groups()
        return bytes([int(number, 16)]) if number else _ESCAPES.get(char, char)

    return re.sub(rb"\\(?:x([0-9a-fA-F]{2})|(.))", byte, token.encode(), flags=re.DOTALL)


class GgufText(TextModel):
    """The vocabulary of a GGUF file, for making text of ids. Prompts stay text, in pieces: llama.cpp tokenizes them."""

    @classmethod
    def of(cls, file: GgufFile) -> GgufText:
        pieces, decoder = _pieces(file)
        tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, []))
        tokenizer.decoder = decoder
        tokenizer.add_special_tokens([token for token in file.added() if token.special])
        ends = [id for name in ("eos", "eot", "eom") if (id := file.token(name)) is not None]
        names = {f"{name}_token": file.tokens[id] for name in ("bos", "eos") if (id := file.token(name)) is not None}
        return cls(
            tokenizer,
            config={
                "vocab_size": len(file.tokens),
                "max_position_embeddings": file.of_model("context_length", None),
            },
            generation_config={"eos_token_id": ends},
            tokenizer_config=names,
            chat_template=file.chat_templates,
        )

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        return [whole(text)]  # type: ignore[list-item]  # a prompt of llama.cpp may mix ids and texts

    tokens_of: Callable[[list[int | str]], list[int]]
    """What llama.cpp makes of a prompt in pieces."""

    def _cut(self, text: str) -> list[int]:
        return self.tokens_of([text])

    def _ends_with(self, prompt: Sequence[int | str], word: str) -> bool:
        # What somebody wrote of it is in pieces of its own.
        return bool(prompt) and isinstance(last := prompt[-1], str) and last.rstrip().endswith(word)

    def pieces(self, request: Request) -> list[int | str]:
        """The prompt for llama.cpp: ids, and texts that it tokenizes.

        It puts a beginning-of-text token before a text that comes first, where the model wants one. A chat template
        has written its own, which therefore becomes an id.
        """
        return self._begun(request, self.encode_request(request))

    def pieces_to_tokenize(self, request: Request) -> list[int | str]:
        """The same of a prompt that may be empty, or longer than the context."""
        return self._begun(request, self._ids(request))

    def _begun(self, request: Request, ids: list[int]) -> list[int | str]:
        pieces: list[int | str] = list(ids)
        first = pieces[0] if pieces else 0
        if request.messages is not None and isinstance(first, str):
            special = next((name for name in self._special_names if first.startswith(name)), None)
            if special is not None:
                rest = first.removeprefix(special)
                pieces[:1] = [self._special_names[special], *([rest] if rest else [])]
        return pieces

    @cached_property
    def _special_names(self) -> dict[str, int]:
        """Longest first."""
        names = {self.tokenizer.id_to_token(id) or "": id for id in self._special}
        return dict(sorted(names.items(), key=lambda item: -len(item[0])))

    def detokenizer(self, *, continuing: bool = False) -> Detokenizer:
        return _UnknownIds(super().detokenizer(continuing=continuing))

    @cached_property
    def letter(self) -> int:
        """Some token that is a whole character."""
        return next(id for data, id in self._by_bytes.items() if data.isalpha())

    def within_character(self, ids: list[int]) -> bool:
        """Is the last character that *ids* make not complete?"""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(self._bytes[id] for id in ids[-4:] if id >= 0))
        return bool(decoder.getstate()[0])

    def swallowed(self, text: str, last_token: int, count: int) -> list[int]:
        """The *count* tokens before *last_token*, which together with it became *text*.

        llama.cpp says nothing of tokens that leave a character incomplete. The one that completes it brings the whole
        text and so tells what the others were, unless they never became a character.
        """
        if count <= 0:
            return []
        data, last = text.encode(), self._bytes[last_token]
        found = self._split(data[: len(data) - len(last)], count) if data.endswith(last) else None
        return found or [UNKNOWN_ID] * count

    def _split(self, data: bytes, count: int) -> list[int] | None:
        """*count* tokens that together are *data*, if there are such."""
        if not count:
            return None if data else []
        for length in range(len(data) - count + 1, 0, -1):
            first = self._by_bytes.get(data[:length])
            if first is not None and (rest := self._split(data[length:], count - 1)) is not None:
                return [first, *rest]
        return None

    @cached_property
    def _bytes(self) -> list[bytes]:
        return self.token_bytes()

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {data: id for id, data in reversed(list(enumerate(self._bytes))) if data}


class _UnknownIds:
    """A `Detokenizer` that knows tokens without an id: they were no characters."""

    def __init__(self, inner: Detokenizer) -> None:
        self._inner = inner

    def push(self, token: int) -> str:
        return self._inner.push(token) if token >= 0 else self._inner.flush() + REPLACEMENT

    def flush(self) -> str:
        return self._inner.flush()
