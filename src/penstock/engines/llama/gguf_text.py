"""The text side of a GGUF file: its vocabulary, its chat template, and characters that came in several tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models

from penstock.core.errors import (
    ModelLoadError,
)
from penstock.core.foreign import whole
from penstock.core.job import Request
from penstock.engines.text.detokenize import REPLACEMENT, Detokenizer
from penstock.engines.text.model import TextModel

#: An id for a token that llama.cpp did not tell: part of a character that never became one.
UNKNOWN_ID = -1


class GgufMetadata:
    """A GGUF file's key/value part."""

    def __init__(self, file: Path) -> None:
        try:
            self._fields = gguf.GGUFReader(file).fields
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{file} is not a GGUF file that can be read: {error}") from error
        self.architecture: str = self.get("general.architecture", "")
        try:
            self.precision = gguf.LlamaFileType(self.get("general.file_type", -1)).name.partition("_")[2].lower()
        except ValueError:
            self.precision = ""

    def get(self, name: str, default: Any) -> Any:
        field = self._fields.get(name)
        return default if field is None else field.contents()

    def of_model(self, name: str, default: Any) -> Any:
        return self.get(f"{self.architecture}.{name}", default)


class GgufText(TextModel):
    """The vocabulary of a GGUF file, for making text of ids. Prompts stay text, in pieces: llama.cpp tokenizes them."""

    @classmethod
    def of(cls, metadata: GgufMetadata, file: Path) -> GgufText:
        tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
        kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [])
        kind = metadata.get("tokenizer.ggml.model", "")
        if not tokens or kind not in _DECODERS:
            raise ModelLoadError(
                f"{file} has a vocabulary of the kind {kind!r}; those of {', '.join(_DECODERS)} can be served."
            )
        tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, []))
        tokenizer.decoder = _DECODERS[kind]()
        special = {gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN}
        tokenizer.add_special_tokens(
            [AddedToken(token, special=True) for token, type in zip(tokens, kinds, strict=False) if type in special]
        )

        def token(name: str) -> int | None:
            id: int | None = metadata.get(f"tokenizer.ggml.{name}_token_id", None)
            return id if id is not None and 0 <= id < len(tokens) else None

        ends = [id for name in ("eos", "eot", "eom") if (id := token(name)) is not None]
        names = {f"{name}_token": tokens[id] for name in ("bos", "eos") if (id := token(name)) is not None}
        return cls(
            tokenizer,
            config={
                "vocab_size": len(tokens),
                "max_position_embeddings": metadata.of_model("context_length", None),
            },
            generation_config={"eos_token_id": ends},
            tokenizer_config=names,
            chat_template=metadata.get("tokenizer.chat_template", None),
        )

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        return [whole(text)]  # type: ignore[list-item]  # a prompt of llama.cpp may mix ids and texts

    tokens_of: Callable[[list[int | str]], list[int]]
    """What llama.cpp makes of a prompt in pieces."""

    def _cut(self, text: str) -> list[int]:
        return self.tokens_of([text])

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


_DECODERS: dict[str, Any] = {
    "gpt2": decoders.ByteLevel,
    "llama": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
}


class _UnknownIds:
    """A `Detokenizer` that knows tokens without an id: they were no characters."""

    def __init__(self, inner: Detokenizer) -> None:
        self._inner = inner

    def push(self, token: int) -> str:
        return self._inner.push(token) if token >= 0 else self._inner.flush() + REPLACEMENT

    def flush(self) -> str:
        return self._inner.flush()
