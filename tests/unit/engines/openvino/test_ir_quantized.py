"""Folders that somebody else has quantised: each layout by hand, and as the same network as its weights widened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support import tiny_models as tiny
from tests.unit.engines.openvino.test_ir import ignore, run

from penstock.core.errors import ModelLoadError
from penstock.engines.openvino.ir import built, packed
from penstock.engines.openvino.ir.quantized import quantized

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}},
}


def read(folder: Path, settings: dict[str, Any], tensors: Tensors) -> Array:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return quantized(folder, settings).read("x.weight").widened()


# ------------------------------------------------------------------------------------------ by hand


def test_gptq_by_hand(tmp_path: Path) -> None:
    """Eight columns of a row in one int32, the first in the lowest bits; so eight rows' zeros, 8 as 7 in version 1."""
    tensors = {
        "x.qweight": np.full((1, 8), 0x76543210, np.uint32).view(np.int32),
        "x.qzeros": np.array([[0x77777787]], np.uint32).view(np.int32),
        "x.scales": np.array([[0.5, 2, 1, 1, 1, 1, 1, 1]], np.float16),
        "x.g_idx": np.zeros(8, np.int32),
    }
    found = read(tmp_path / "v1", {**GPTQ, "group_size": -1}, tensors)
    np.testing.assert_array_equal(found[0], (np.arange(8) - 8) * 0.5)
    np.testing.assert_array_equal(found[1], (np.arange(8) - 9) * 2.0)
    found = read(tmp_path / "v2", {**GPTQ, "group_size": -1, "checkpoint_format": "gptq_v2"}, tensors)
    np.testing.assert_array_equal(found[0], (np.arange(8) - 7) * 0.5)


def test_awq_by_hand(tmp_path: Path) -> None:
    """A column of eight rows in one int32: rows 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up."""
    tensors = {
        "x.qweight": np.array([[0x75316420], [0x00000001]], np.uint32).view(np.int32),
        "x.qzeros": np.array([[0x00000003]], np.uint32).view(np.int32),
        "x.scales": np.full((1, 8), 0.25, np.float16),
    }
    found = read(tmp_path / "awq", {**AWQ, "group_size": -1}, tensors)
    expected = np.stack([np.arange(8), [1, 0, 0, 0, 0, 0, 0, 0]], axis=1) - np.array([[3]] + [[0]] * 7)
    np.testing.assert_array_equal(found, expected * 0.25)


def test_compressed_tensors_by_hand(tmp_path: Path) -> None:
    """A row of ten columns in two int32, 8 for 0."""
    tensors = {
        "x.weight_packed": np.array([[0x01234567, 0x00000098]], np.uint32).view(np.int32),
        "x.weight_scale": np.array([[2.0]], np.float16),
        "x.weight_shape": np.array([1, 10], np.int64),
    }
    found = read(tmp_path / "c", COMPRESSED, tensors)
    np.testing.assert_array_equal(found, [[-2, -4, -6, -8, -10, -12, -14, -16, 0, 2]])


# ------------------------------------------------------------------------------------------ the whole network


def pack(codes: Array, bits: int) -> Array:
    """Along the last axis, the first in the lowest bits."""
    each = 32 // bits
    groups = codes.astype(np.uint64).reshape(*codes.shape[:-1], -1, each)
    words = sum(groups[..., i] << np.uint64(i * bits) for i in range(each))
    return np.ascontiguousarray(words).astype(np.uint32).view(np.int32)


def rounded(weight: Array, bits: int, group: int, symmetric: bool) -> tuple[Array, Array, Array, Array]:
    """Codes [rows, columns], scales and zeros [rows, groups], and the weights that they stand for."""
    rows, columns = weight.shape
    group = columns if group < 0 else group
    groups = weight.reshape(rows, -1, group)
    most = 2**bits - 1
    if symmetric:
        scale = (np.abs(groups).max(-1) * 2 / most).astype(np.float16)
        zero = np.full(scale.shape, 2 ** (bits - 1))
    else:
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scale = ((high - low) / most).astype(np.float16)
        zero = np.clip(np.round(-low / scale.astype(np.float32)), 0, most)
    wide = scale.astype(np.float32)[..., None]
    codes = np.clip(np.round(groups / wide) + zero[..., None], 0, most)
    meant = ((codes - zero[..., None]) * wide).reshape(rows, columns)
    return codes.reshape(rows, columns), scale, zero, meant.astype(np.float32)


def gptq(codes: Array, scale: Array, zero: Array, bits: int, less: int = 1) -> Tensors:
    columns, groups = codes.shape[1], scale.shape[1]
    stored = (zero.astype(np.int64) - less) % 2**bits
    return {
        "qweight": np.ascontiguousarray(pack(codes, bits).T),
        "qzeros": pack(np.ascontiguousarray(stored.T), bits),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": (np.arange(columns) // (columns // groups)).astype(np.int32),
    }


def gptq_2(codes: Array, scale: Array, zero: Array, bits: int) -> Tensors:
    return gptq(codes, scale, zero, bits, less=0)


def awq(codes: Array, scale: Array, zero: Array, bits: int) -> Tensors:
    def interleaved(numbers: Array) -> Array:
        return numbers.reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(numbers.shape)

    return {
        "qweight": pack(interleaved(np.ascontiguousarray(codes.T)), bits),
        "qzeros": pack(interleaved(np.ascontiguousarray(zero.T)), bits),
        "scales": np.ascontiguousarray(scale.T),
    }


def compressed(codes: Array, scale: Array, zero: Array, bits: int) -> Tensors:
    return {
        "weight_packed": pack(codes, bits),
        "weight_scale": scale,
        "weight_zero_point": np.ascontiguousarray(pack(np.ascontiguousarray(zero.T), bits).T),
        "weight_shape": np.array(codes.shape, np.int64),
    }


def quantise(folder: Path, settings: dict[str, Any], write: Callable[..., Tensors], **how: Any) -> Tensors:
    """Quantise the linear layers of a folder in place. Returns the weights that they now stand for."""
    tensors, result = load_file(folder / "model.safetensors"), {}
    meant = dict(tensors)
    for name, tensor in tensors.items():
        if "_proj." not in name or name.endswith(".bias"):
            result[name] = tensor
            continue
        codes, scale, zero, meant[name] = rounded(tensor, **how)
        for part, value in write(codes, scale, zero, how["bits"]).items():
            result[f"{name.removesuffix('.weight')}.{part}"] = value
    save_file(result, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return meant


@pytest.mark.parametrize(
    ("settings", "write", "how"),
    [
        (GPTQ, gptq, {"bits": 4, "group": 32, "symmetric": True}),
        (GPTQ, gptq, {"bits": 4, "group": 32, "symmetric": False}),
        ({**GPTQ, "bits": 8}, gptq, {"bits": 8, "group": -1, "symmetric": True}),
        ({**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}, gptq_2, {"bits": 8, "group": 16, "symmetric": False}),
        (AWQ, awq, {"bits": 4, "group": 32, "symmetric": False}),
        (COMPRESSED, compressed, {"bits": 4, "group": 32, "symmetric": True}),
        (COMPRESSED, compressed, {"bits": 4, "group": 16, "symmetric": False}),
    ],
    ids=["gptq-sym", "gptq-asym", "gptq-8-row", "gptq-v2-8-asym", "awq", "compressed-sym", "compressed-asym"],
)
def test_logits_are_those_of_the_weights_widened(
    settings: dict[str, Any], write: Callable[..., Tensors], how: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny.llama(tmp_path / "packed", attention_bias=True)
    meant = quantise(folder, settings, write, **how)
    assert packed(folder)
    wide = tiny.llama(tmp_path / "wide", attention_bias=True)
    save_file(meant, wide / "model.safetensors")
    expected = run(wide, tmp_path / "cache")
    np.testing.assert_allclose(run(folder, tmp_path / "cache"), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"bits": 4}, "unnamed"),
        ({**GPTQ, "bits": 3}, "3 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ({**GPTQ, "dynamic": {"-:.*": {}}}, "layer to layer"),
        ({**AWQ, "version": "gemv"}, "gemv"),
        ({**COMPRESSED, "format": "float-quantized"}, "float-quantized"),
        ({**COMPRESSED, "config_groups": {"a": {"weights": {"num_bits": 4, "actorder": "group"}}}}, "not known here"),
    ],
)
def test_other_layouts_are_refused_by_name(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model", quantization_config=settings)
    with pytest.raises(ModelLoadError, match=rf"quantized.*{words}.*optimum-cli"):
        built(folder, tmp_path / "cache", ignore)


def test_gptq_in_the_order_of_activations_is_refused(tmp_path: Path) -> None:
    def shuffled(*given: Any) -> Tensors:
        tensors = gptq(*given)
        return {**tensors, "g_idx": np.ascontiguousarray(tensors["g_idx"][::-1])}

    folder = tiny.llama(tmp_path / "model")
    quantise(folder, GPTQ, shuffled, bits=4, group=32, symmetric=True)
    with pytest.raises(ModelLoadError, match="desc_act"):
        built(folder, tmp_path / "cache", ignore)
