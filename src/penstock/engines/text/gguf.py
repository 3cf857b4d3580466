"""GGUF files: their metadata, and the tokenizer and the settings of the text side that are in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from penstock.core.errors import ModelLoadError


class GgufFile:
    """A GGUF file. Its tensors are mapped, not read. Raises `ModelLoadError` where it is none, or not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise ModelLoadError(f"{path} is not a GGUF file that can be read: {error}") from error
        self._fields = reader.fields
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
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

    # -------------------------------------------------------------------------------------- the vocabulary

    @property
    def vocabulary(self) -> str:
        """Its kind: gpt2 (byte-level pairs), llama (SentencePiece), …"""
        kind: str = self.get("tokenizer.ggml.model", "")
        return kind

    @cached_property
    def tokens(self) -> list[str]:
        tokens: list[str] = self.get("tokenizer.ggml.tokens", [])
        return tokens

    @cached_property
    def kinds(self) -> list[int]:
        """Of each token; see ``gguf.TokenType``."""
        return self.get("tokenizer.ggml.token_type", None) or [gguf.TokenType.NORMAL] * len(self.tokens)

    def token(self, name: str) -> int | None:
        """The id of the token that is called *name*: bos, eos, eot …"""
        id: int | None = self.get(f"tokenizer.ggml.{name}_token_id", None)
        return id if id is not None and 0 <= id < len(self.tokens) else None

    @property
    def chat_templates(self) -> dict[str, str]:
        """By name; most files have one, which is ``default``."""
        key = "tokenizer.chat_template"
        named = {
            name.removeprefix(f"{key}."): self.get(name, "") for name in self._fields if name.startswith(f"{key}.")
        }
        return {**({"default": self.get(key, "")} if key in self._fields else {}), **named}

    def added(self) -> list[AddedToken]:
        """The tokens that are matched in a text before it is cut up, special or not."""
        special = {gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN}
        return [
            AddedToken(token, special=kind in special, normalized=False)
            for token, kind in zip(self.tokens, self.kinds, strict=False)
            if kind in special or kind == gguf.TokenType.USER_DEFINED
        ]


def decoder_of(file: GgufFile) -> Any:
    """From tokens to text. Raises `ModelLoadError` for a vocabulary of another kind."""
    if not file.tokens or file.vocabulary not in _DECODERS:
        raise ModelLoadError(
            f"{file.path} has a vocabulary of the kind {file.vocabulary!r}; those of {', '.join(_DECODERS)} can be "
            "served."
        )
    return _DECODERS[file.vocabulary]()


_DECODERS: dict[str, Callable[[], Any]] = {
    "gpt2": decoders.ByteLevel,
    "llama": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
}

# ------------------------------------------------------------------------------------------ from text to tokens

#: How a text is cut before pairs are merged, as the makers of these vocabularies do it (``tokenizer.json``).
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(end: str, digits: str) -> str:
    """Words by the case of their letters."""
    begin = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{begin}{_UPPER}*{_LOWER}+{end}|{begin}{_UPPER}+{_LOWER}*{end}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_and_words() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _words()])


def _cut(pattern: str) -> Callable[[], Any]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA_3 = _cut(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}")
_QWEN = _cut(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}")

_CUTS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "granite-docling"), _words),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _digits_and_words),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), _LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN),
    "tekken": _cut(_cased("", r"\p{N}")),
    "gpt-4o": _cut(_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")),
}
#: A word that is a token is not put together from pairs; and a text begins with a token that says so.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
#: The makers' tokenizers compose characters first.
_COMPOSED = ("qwen2", "deepseek-r1-qwen")

#: What ends a turn, by name: files often tell one of a model's end tokens only.
_ENDS = (
    "<|return|>",
    "<|call|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
)


def tokenizer_of(file: GgufFile) -> Tokenizer:
    """The tokenizer that the metadata describe. Raises `ModelLoadError` where they describe none that is known."""
    decoder = decoder_of(file)
    tokenizer = _byte_level(file) if file.vocabulary == "gpt2" else _sentence_piece(file)
    if file.vocabulary == "gpt2" or file.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.decoder = decoder
    else:
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens(file.added())
    bos = file.token("bos")
    if bos is not None and adds_bos(file):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{file.tokens[bos]} $A", special_tokens=[(file.tokens[bos], bos)]
        )
    return tokenizer


def adds_bos(file: GgufFile) -> bool:
    """Does a text begin with a token that says so?"""
    usual = file.vocabulary == "llama" or file.get("tokenizer.ggml.pre", "") in _WHOLE_WORDS
    return bool(file.get("tokenizer.ggml.add_bos_token", usual))


def _byte_level(file: GgufFile) -> Tokenizer:
    cut = file.get("tokenizer.ggml.pre", "")
    if cut not in _CUTS:
        raise ModelLoadError(
            f"{file.path} cuts texts in a way that is not known here ({cut or 'it does not say how'}). The llama "
            "engine reads it (pip install 'penstock[llama]', then --engine llama)."
        )
    vocabulary = {token: id for id, token in enumerate(file.tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", [])]
    if any(
        "".join(pair) not in vocabulary or pair[0] not in vocabulary or pair[-1] not in vocabulary for pair in merges
    ):
        raise ModelLoadError(f"{file.path} has a vocabulary that lacks tokens which its merges make.")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut in _WHOLE_WORDS))
    tokenizer.pre_tokenizer = _CUTS[cut]()
    if cut in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentence_piece(file: GgufFile) -> Tokenizer:
    """Pairs are merged in the order of the scores of what they become."""
    ids = {token: id for id, token in enumerate(file.tokens)}
    scores = file.get("tokenizer.ggml.scores", [])
    pairs = [
        (-scores[id], len(token), ids[token[:i]], ids[token[i:]])
        for token, id in ids.items()
        if file.kinds[id] in (gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED)
        for i in range(1, len(token))
        if token[:i] in ids and token[i:] in ids
    ]
    merges = [(file.tokens[left], file.tokens[right]) for _, _, left, right in sorted(pairs)]
    unknown = file.token("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            ids, merges, unk_token=None if unknown is None else file.tokens[unknown], fuse_unk=True, byte_fallback=True
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    return tokenizer


def write_text(file: GgufFile, folder: Path) -> None:
    """The text side's files of a Hugging Face folder, out of the metadata."""
    tokenizer_of(file).save(str(folder / "tokenizer.json"))
    names = {
        f"{name}_token": file.tokens[id]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (id := file.token(key)) is not None
    }
    _write(folder / "tokenizer_config.json", {**names, "add_bos_token": adds_bos(file)})
    _write(folder / "generation_config.json", {"eos_token_id": sorted(ends_of(file))})
    for name, template in file.chat_templates.items():
        place = (
            folder / "chat_template.jinja" if name == "default" else folder / f"additional_chat_templates/{name}.jinja"
        )
        if re.fullmatch(r"\w+", name):
            place.parent.mkdir(exist_ok=True)
            place.write_text(template, encoding="utf-8")


def ends_of(file: GgufFile) -> set[int]:
    """The ids of the tokens that end a reply."""
    told = {id for name in ("eos", "eot", "eom") if (id := file.token(name)) is not None}
    control = gguf.TokenType.CONTROL
    known = {token: i for i, token in enumerate(file.tokens) if token in _ENDS and file.kinds[i] == control}
    if "<|return|>" in known:  # gpt-oss, whose messages within a reply have ends too
        known.pop("<|end|>", None)
    return told.union(known.values())


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")
