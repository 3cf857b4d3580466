"""What sentence-transformers writes beside a model is obeyed, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support.encoder import SIZE, with_modules

from penstock.core.errors import ModelLoadError
from penstock.engines.parts.modules import module_files, modules_of

RANDOM = np.random.default_rng(7)
LENGTHS = (5, 2, 1)
HIDDEN = RANDOM.normal(0, 1, (len(LENGTHS), max(LENGTHS), SIZE)).astype(np.float32)
MASK = np.array([[1] * length + [0] * (max(LENGTHS) - length) for length in LENGTHS])
TOKENS = [HIDDEN[row, :length].astype(np.float64) for row, length in enumerate(LENGTHS)]
"""The same, of each text its own."""

#: By sentence-transformers' names, of one text's tokens.
POOLINGS: dict[str, Callable[[Any], Any]] = {
    "cls_token": lambda tokens: tokens[0],
    "max_tokens": lambda tokens: tokens.max(axis=0),
    "mean_tokens": lambda tokens: tokens.mean(axis=0),
    "mean_sqrt_len_tokens": lambda tokens: tokens.sum(axis=0) / np.sqrt(len(tokens)),
    "weightedmean_tokens": lambda tokens: np.average(tokens, axis=0, weights=range(1, len(tokens) + 1)),
    "lasttoken": lambda tokens: tokens[-1],
}


@pytest.mark.parametrize("mode", POOLINGS)
def test_each_pooling_sees_a_text_s_own_tokens(tmp_path: Path, mode: str) -> None:
    modules = modules_of(with_modules(tmp_path, **{f"pooling_mode_{mode}": True}))
    np.testing.assert_allclose(modules(HIDDEN, MASK), [POOLINGS[mode](tokens) for tokens in TOKENS], atol=1e-6)
    assert modules.dimensions(SIZE) == SIZE


@pytest.mark.parametrize(
    ("pooling", "modes"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ["cls_token", "mean_tokens"]),
        ({"pooling_mode": ["lasttoken", "max"]}, ["lasttoken", "max_tokens"]),
    ],
    ids=["as switches, in the library's order", "as a list, in its own"],
)
def test_several_poolings_are_joined(tmp_path: Path, pooling: dict[str, Any], modes: list[str]) -> None:
    modules = modules_of(with_modules(tmp_path, **pooling))
    right = [np.concatenate([POOLINGS[mode](tokens) for mode in modes]) for tokens in TOKENS]
    np.testing.assert_allclose(modules(HIDDEN, MASK), right, atol=1e-6)
    assert modules.dimensions(SIZE) == 2 * SIZE


def test_dense_layers_and_lengths_in_between_follow_in_their_order(tmp_path: Path) -> None:
    """As in LaBSE (one, with tanh) and EmbeddingGemma (two, without), and then normalized in the middle."""
    modules = modules_of(with_modules(tmp_path, "Dense", "Normalize", "Dense", "Normalize", pooling_mode="mean"))
    first, second = (load_file(tmp_path / f"{place}_Dense/model.safetensors") for place in (2, 4))
    right = []
    for tokens in TOKENS:
        vector = np.tanh(first["linear.weight"] @ tokens.mean(axis=0) + first["linear.bias"])
        right.append(second["linear.weight"] @ (vector / np.linalg.norm(vector)))
    np.testing.assert_allclose(modules(HIDDEN, MASK), right, atol=1e-6)  # the last length is an option's
    assert modules.dimensions(SIZE) == 12


def test_the_operator_s_pooling_comes_before_the_folder_s(tmp_path: Path) -> None:
    modules = modules_of(with_modules(tmp_path, "Dense", pooling_mode="mean"), "last")
    dense = load_file(tmp_path / "2_Dense/model.safetensors")
    right = [np.tanh(dense["linear.weight"] @ tokens[-1] + dense["linear.bias"]) for tokens in TOKENS]
    np.testing.assert_allclose(modules(HIDDEN, MASK), right, atol=1e-6)


def test_all_files_that_are_read_are_told(tmp_path: Path) -> None:
    with_modules(tmp_path, "Dense", "Normalize", pooling_mode="mean")
    files = ["modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    assert module_files(tmp_path) == files


def _config(folder: Path, **changes: Any) -> None:
    file = folder / "2_Dense/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _module(folder: Path, index: int, **changes: str) -> None:
    file = folder / "modules.json"
    listed = json.loads(file.read_text())
    listed[index] |= changes
    file.write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: _module(folder, 2, type="sentence_transformers.models.LSTM"), "LSTM, which cannot"),
        (lambda folder: _module(folder, 1, type="sentence_transformers.models.Dense"), "Transformer, Dense, Dense"),
        (lambda folder: _module(folder, 0, path="0_Transformer"), "is in 0_Transformer"),
        (lambda folder: _module(folder, 2, path="../elsewhere"), "outside of it"),
        (lambda folder: _config(folder, activation_function="their.own.Swirl"), r"their\.own\.Swirl"),
        (lambda folder: _config(folder, activation_function="torch.nn.modules.activation.Mish"), "Mish"),
        (lambda folder: _config(folder, use_residual=True), "use_residual"),
        (lambda folder: _config(folder, module_input_name="token_embeddings"), "token_embeddings"),
        (lambda folder: _config(folder, bias=False), r"linear\.bias"),
        (lambda folder: (folder / "2_Dense/model.safetensors").unlink(), "convert it to safetensors"),
        (lambda folder: (folder / "modules.json").write_text("[{}]"), "cannot be read"),
        (
            lambda folder: (folder / "1_Pooling/config.json").write_text('{"pooling_mode": "attention"}'),
            "the pooling attention",
        ),
        (lambda folder: (folder / "1_Pooling/config.json").unlink(), "does not say how"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, change: Callable[[Path], Any], words: str) -> None:
    change(with_modules(tmp_path, "Dense", pooling_mode="mean"))
    with pytest.raises(ModelLoadError, match=words):
        modules_of(tmp_path)


def test_a_layer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with_modules(tmp_path, "Dense", pooling_mode="mean")
    save_file(
        {"linear.weight": np.zeros((24, 7), np.float32), "linear.bias": np.zeros(24, np.float32)},
        tmp_path / "2_Dense/model.safetensors",
    )
    with pytest.raises(ModelLoadError, match="takes vectors of 7 dimensions, but they have 48"):
        modules_of(tmp_path).dimensions(SIZE)
