"""Vectors by the transformers engine: of every kind of encoder what the library's own module gives each text alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.encoder import TEXTS, Reference, encoder, with_modules, word_piece
from tests.support.torch import NO_TORCH, TORCH

from penstock.core.errors import ModelLoadError
from penstock.core.events import Prefix
from penstock.core.job import Request
from penstock.core.tasks import vector_values

if TORCH is None:
    pytest.skip(NO_TORCH, allow_module_level=True)

import torch
from safetensors.torch import load_file, save_file
from tests.support.torch_models import DEVICE, SMALL, loaded
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel

from penstock.engines.child.backend import Backend, load_backend
from penstock.engines.parts.embedding import EmbeddingBackend
from penstock.engines.transformers.embed import is_encoder
from penstock.engines.transformers.options import TransformersOptions

ENCODER = {**SMALL, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0, "type_vocab_size": 2}


def vectors(backend: Backend) -> Any:
    """Of `TEXTS`, all in one request."""
    backend.add(1, Request("tiny", task="embed", inputs=tuple(TEXTS)), [Prefix()], 1)
    found: dict[int, list[float]] = {}
    while backend.busy:
        for output in backend.step():
            assert output.finish is None or output.finish.error is None
            found |= {index: vector_values(text) for index, text in zip(output.ids, output.texts, strict=True)}
    return np.array([found[index] for index in range(len(TEXTS))])


def folder_of(folder: Path, kind: str, pooling: str, **changes: Any) -> Path:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**ENCODER, **changes})
    AutoModel.from_config(config, dtype=torch.float32).save_pretrained(folder)
    word_piece().save(str(folder / "tokenizer.json"))
    return with_modules(folder, "Normalize", pooling_mode=pooling)


def alone(folder: Path, pooling: str, texts: Sequence[str] = TEXTS) -> Any:
    """The same by the library's module, a text at a time."""
    reference = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for text in texts:
        with torch.inference_mode():
            hidden = reference(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].numpy()
        vector = {"mean": hidden.mean(axis=0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]
        found.append(vector / np.linalg.norm(vector))
    return np.array(found)


@pytest.mark.parametrize(
    ("kind", "pooling", "changes"),
    [
        ("bert", "mean", {}),
        ("mpnet", "mean", {}),
        ("distilbert", "cls", {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}),
        ("modernbert", "cls", {"local_attention": 8, "global_attn_every_n_layers": 2}),
        ("nomic_bert", "mean", {}),
        ("xlm-roberta", "mean", {"pad_token_id": 1}),
        ("qwen3", "lasttoken", {}),
        ("gemma3_text", "mean", {"use_bidirectional_attention": True, "sliding_window": 8}),
    ],
    ids=["bert", "mpnet", "distilbert", "modernbert", "nomic", "xlm-roberta", "qwen3-embedding", "embeddinggemma"],
)
def test_vectors_are_those_of_each_text_alone(tmp_path: Path, kind: str, pooling: str, changes: dict[str, Any]) -> None:
    folder = folder_of(tmp_path, kind, pooling, **changes)
    backend = loaded(folder)
    assert isinstance(backend, EmbeddingBackend)
    assert backend.info.tasks == ("embed", "tokenize")
    np.testing.assert_allclose(vectors(backend), alone(folder, pooling), atol=2e-6)


@pytest.mark.parametrize("engine", ["transformers", "openvino"])
def test_a_dense_module_has_its_part_on_every_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """As in LaBSE, whose vectors without it have the wrong size."""
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    folder = with_modules(encoder(tmp_path / "m"), "Dense", "Normalize", pooling_mode_cls_token=True)
    backend = load_backend(engine, "tiny", str(folder), {}, lambda what, fraction: None)
    assert backend.info.dimensions == 24
    dense = load_file(folder / "2_Dense/model.safetensors")
    reference = Reference(folder)
    right = []
    for text in TEXTS:
        vector = reference.vector(text, "cls", normalize=False)
        vector = np.tanh(dense["linear.weight"].numpy() @ vector + dense["linear.bias"].numpy())
        right.append(vector / np.linalg.norm(vector))
    np.testing.assert_allclose(vectors(backend), right, atol=2e-5)


def test_texts_are_in_lower_case_where_the_model_wants_them_so(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "bert", "mean")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": true}')
    lowered = [text.lower() for text in TEXTS]
    np.testing.assert_allclose(vectors(loaded(folder)), alone(folder, "mean", lowered), atol=2e-6)


def test_a_pooling_without_the_prompt_is_refused_where_there_is_one(tmp_path: Path) -> None:
    folder = with_modules(encoder(tmp_path), pooling_mode="mean", include_prompt=False)
    assert loaded(folder, device=DEVICE).info.dimensions == 48
    with pytest.raises(ModelLoadError, match="include_prompt"):
        loaded(folder, query_instruction="query: ")


def test_an_encoder_without_its_weights_is_refused(tmp_path: Path) -> None:
    folder = encoder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"encoder\.layer\.1\.output\.dense\.weight are not in its files"):
        loaded(folder)


def test_the_default_engine_says_who_embeds_with_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    folder = folder_of(tmp_path / "m", "qwen3", "lasttoken")
    with pytest.raises(ModelLoadError, match="serve it with --engine transformers"):
        load_backend("openvino", "tiny", str(folder), {}, lambda what, fraction: None)


@pytest.mark.parametrize(("architecture", "embeds"), [("GPT2LMHeadModel", False), ("BertModel", True)])
def test_a_network_with_a_head_writes(architecture: str, embeds: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert is_encoder(tmp_path, TransformersOptions()) is embeds
