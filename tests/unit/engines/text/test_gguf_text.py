"""The tokenizer and the settings that a GGUF file's metadata describe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.support import gguf as files
from tests.support import tiny_models as tiny
from tokenizers import Tokenizer

from penstock.core.errors import ModelLoadError
from penstock.core.job import Message
from penstock.engines.text.gguf import GgufFile, tokenizer_of, write_text
from penstock.engines.text.model import TextModel
from penstock.models.catalogue import PACKAGED

TEXTS = ["the mill turns", " größer  水車 1234!\n\n x", "I'll say: 'naïve'\t<s>no", "", "a"]


def vocabulary(path: Path, kind: str, tokens: Sequence[str], **more: Any) -> GgufFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(list(tokens))
    for name, value in more.items():
        getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def test_a_byte_level_tokenizer_is_the_one_that_was_written(tmp_path: Path) -> None:
    ours = tokenizer_of(GgufFile(files.bundled_gguf(tmp_path)))
    original = Tokenizer.from_file(str(PACKAGED / "millrace" / "tokenizer.json"))
    for text in TEXTS:
        ids = original.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)


def test_the_text_side_of_a_folder_is_the_one_that_was_written(tmp_path: Path) -> None:
    write_text(GgufFile(files.bundled_gguf(tmp_path)), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    ours, original = TextModel.load(tmp_path), TextModel.load(PACKAGED / "millrace")
    assert ours.eos_ids == original.eos_ids
    assert ours.encode("the mill") == original.encode("the mill")
    messages = [Message("user", "Hello <|im_end|> there")]
    assert ours.encode_chat(messages) == original.encode_chat(messages)


def test_pieces_are_merged_in_the_order_of_their_scores(tmp_path: Path) -> None:
    original = tiny.byte_fallback()
    tokens = [original.id_to_token(id) for id in range(original.get_vocab_size())]
    merges = json.loads(original.to_str())["model"]["merges"]
    order = {"".join(pair): -float(rank) for rank, pair in enumerate(merges)}
    types = [
        gguf.TokenType.UNKNOWN if token == "<unk>"
        else gguf.TokenType.CONTROL if token in ("<s>", "</s>")
        else gguf.TokenType.BYTE if token.startswith("<0x")
        else gguf.TokenType.NORMAL
        for token in tokens
    ]  # fmt: skip
    file = vocabulary(
        tmp_path / "x.gguf", "llama", tokens, add_token_types=types, add_bos_token_id=1, add_unk_token_id=0,
        add_token_scores=[order.get(token, -100.0) for token in tokens],
    )  # fmt: skip
    ours = tokenizer_of(file)
    for text in ("the  when w", "hewth 水 ü", " the"):
        ids = original.encode(text).ids
        assert ours.encode(text).ids == [1, *ids]  # such files begin with a token that says so
        assert ours.decode(ids) == original.decode(ids)


@pytest.mark.parametrize(
    ("cut", "pieces"),
    [
        ("gpt-2", "It|'s| 12345| x| | Y|¶|¶|!"),
        ("smollm", "It|'s| |1|2|3|4|5| x| | Y|¶|¶|!"),
        ("llama-bpe", "It|'s| |123|45| x| | Y|¶¶|!"),
        ("qwen2", "It|'s| |1|2|3|4|5| x| | Y|¶¶|!"),
        ("tekken", "It|'s| |1|2|3|4|5| x| | Y|¶¶|!"),
        ("gpt-4o", "It's| |123|45| x| | Y|¶¶|!"),
    ],
)
def test_texts_are_cut_as_the_vocabulary_wants_it(cut: str, pieces: str, tmp_path: Path) -> None:
    file = vocabulary(tmp_path / "x.gguf", "gpt2", ["a", "b", "ab"], add_tokenizer_pre=cut, add_token_merges=["a b"])
    found = tokenizer_of(file).pre_tokenizer.pre_tokenize_str("It's 12345 x  Y\n\n!")
    assert "|".join(piece for piece, _ in found).replace("Ġ", " ").replace("Ċ", "¶") == pieces


def test_merges_without_their_tokens_are_refused(tmp_path: Path) -> None:
    file = vocabulary(tmp_path / "x.gguf", "gpt2", ["a", "b"], add_tokenizer_pre="gpt-2", add_token_merges=["a b"])
    with pytest.raises(ModelLoadError, match="lacks tokens"):
        tokenizer_of(file)


@pytest.mark.parametrize("cut", ["default", "superbpe", ""])
def test_another_way_to_cut_texts_is_refused(cut: str, tmp_path: Path) -> None:
    file = vocabulary(tmp_path / "x.gguf", "gpt2", ["a", "b"], add_tokenizer_pre=cut)
    with pytest.raises(ModelLoadError, match=rf"{cut or 'does not say'}.*--engine llama"):
        tokenizer_of(file)


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="'bert'"):
        tokenizer_of(vocabulary(tmp_path / "x.gguf", "bert", ["a", "b"]))
