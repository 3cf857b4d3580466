"""GGUF files read straight into the network: blocks, names, config, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support import gguf as files
from tests.support import tiny_models as tiny
from tests.support.architectures import SIZES, made
from tests.support.torch import NO_TORCH, TORCH
from tests.unit.engines.openvino.test_ir import ignore, run

from penstock.core.errors import ModelLoadError
from penstock.engines.openvino.ir import built
from penstock.engines.openvino.ir.config import Config
from penstock.engines.openvino.ir.gguf import GgufWeights
from penstock.engines.openvino.ir.rope import rotary_of
from penstock.engines.text.gguf import GgufFile

SAFETENSORS = "model.safetensors"

Type = gguf.GGMLQuantizationType
KINDS = [Type.F32, Type.F16, Type.BF16]
KINDS += [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]


def blocks(kind: Type, rows: int, columns: int, seed: int = 0) -> Any:
    """Rows of a tensor of this kind: any bytes, with finite numbers where scales are."""
    random = np.random.default_rng(seed)
    if kind in KINDS[:8]:
        return gguf.quantize(random.normal(0, 1, (rows, columns)).astype(np.float32), kind)
    size, length = gguf.GGML_QUANT_SIZES[kind]
    data = random.integers(0, 256, (rows * columns // size, length), np.uint8)
    halves = random.normal(0, 0.1, (len(data), 2)).astype(np.float16).view(np.uint8)
    if kind == Type.Q6_K:
        data[:, -2:] = halves[:, :2]
    else:
        data[:, :4] = halves
    return data.reshape(rows, -1)


def with_tensor(path: Path, kind: Type, data: Any, **changes: Any) -> GgufFile:
    """A file of no layers, with *data* as its embedding."""
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_block_count(0)
    writer.add_head_count(4)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in changes.get("numbers", {}).items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    for name in changes.get("tensors", ()):
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_numbers_are_those_of_the_reference(kind: Type, tmp_path: Path) -> None:
    file = with_tensor(tmp_path / "x.gguf", kind, blocks(kind, 6, 512))
    expected = gguf.dequantize(file.tensors["token_embd.weight"].data, kind)
    read = GgufWeights(file).read("model.embed_tokens.weight")
    assert read.shape == (6, 512)
    np.testing.assert_allclose(read.widened(), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(read.widened(slice(2, 4)), read.widened()[2:4])


def test_groups_without_a_scale_are_their_minimum(tmp_path: Path) -> None:
    data = gguf.quantize(np.repeat(np.array([[0.0], [0.5]], np.float32), 32, axis=1), Type.Q4_1)
    read = GgufWeights(with_tensor(tmp_path / "x.gguf", Type.Q4_1, data)).read("model.embed_tokens.weight")
    np.testing.assert_array_equal(read.widened(), np.repeat([[0.0], [0.5]], 32, axis=1))


@pytest.mark.parametrize("weights", ["f32", "f16", "q8_0", "q4_1"])
def test_logits_are_those_of_the_same_weights_in_safetensors(weights: str, tmp_path: Path) -> None:
    """Rotated pairs in llama.cpp's order and back, a head of its own, grouped keys."""
    folder = tiny.llama(tmp_path / "model")
    file = files.convert(folder, tmp_path / "model.gguf", weights)
    logits = run(file, tmp_path / "cache")
    rounded = {name: _rounded(tensor, files.TYPES[weights]) for name, tensor in load_file(folder / SAFETENSORS).items()}
    save_file(rounded, folder / SAFETENSORS)
    expected = run(folder, tmp_path / "cache")
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.skipif(TORCH is None, reason=NO_TORCH)
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {"head_dim": 16}),
        ("SmolLM3ForCausalLM", {"num_hidden_layers": 5}),
        ("Olmo2ForCausalLM", {}),
        (
            "GraniteForCausalLM",
            {
                "attention_multiplier": 0.5,
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.4,
                "logits_scaling": 2.0,
            },
        ),
    ],
)
def test_every_family_has_its_names_and_numbers(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    made(folder, architecture, {**SIZES, **changes})
    (folder / "tokenizer_config.json").write_text("{}")
    logits = run(files.convert(folder, tmp_path / "model.gguf"), tmp_path / "cache")
    expected = run(folder, tmp_path / "cache")
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_the_quotients_of_rotary_scaling_are_obeyed(tmp_path: Path) -> None:
    """Llama 3's, whose files have them worked out."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**scaling, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    plain = tiny.llama(tmp_path / "plain")
    scaled = tiny.llama(tmp_path / "scaled", rope_parameters=rope)
    turns = [
        np.array(rotary_of(Config({"max_position_embeddings": 256, "rope_parameters": each}), 16).frequencies)
        for each in ({}, rope)
    ]
    file = files.convert(plain, tmp_path / "scaled.gguf", quotients=turns[0] / turns[1])
    expected = run(scaled, tmp_path / "cache")
    np.testing.assert_allclose(run(file, tmp_path / "cache"), expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(run(plain, tmp_path / "cache") - expected).max() > 1e-2


def _rounded(tensor: Any, kind: Type) -> Any:
    if tensor.ndim == 1:
        return tensor
    return np.ascontiguousarray(gguf.dequantize(gguf.quantize(tensor, kind), kind))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "mamba"}, "mamba"),
        ({"tensors": ["blk.0.ffn_gate_exps.weight"]}, "ffn_gate_exps"),
        ({"numbers": {"expert_count": 8}}, "mixture of experts"),
        ({"numbers": {"attention.value_length": 8}}, "differ in size"),
    ],
)
def test_what_is_not_known_is_refused_with_the_engine_that_knows_it(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = with_tensor(tmp_path / "x.gguf", Type.F32, np.ones((4, 256), np.float32), **changes)
    with pytest.raises(ModelLoadError, match=rf"{words}.*--engine llama"):
        GgufWeights(file)


def test_kinds_of_blocks_that_are_not_known_are_named(tmp_path: Path) -> None:
    file = with_tensor(tmp_path / "x.gguf", Type.Q2_K, np.zeros((1, 84), np.uint8))
    with pytest.raises(ModelLoadError, match=r"token_embd.*Q2_K.*--engine llama"):
        GgufWeights(file)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(ModelLoadError, match="not a GGUF file"):
        built(tmp_path / "x.gguf", tmp_path / "cache", ignore)
    assert not any((tmp_path / "cache").iterdir())
