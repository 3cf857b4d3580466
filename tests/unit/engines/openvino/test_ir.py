"""Building the network from safetensors: against a plain numpy Llama."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support import tiny_models as tiny

from penstock.core.errors import ModelLoadError
from penstock.engines.openvino.ir import built
from penstock.engines.openvino.ov import ov

Array = np.ndarray[Any, Any]

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
IDS = np.array([[5, 17, 200, 31, 31, 8, 90, 4]])


def ignore(what: str, fraction: float | None) -> None:
    pass


def run(folder: Path, cache: Path) -> Array:
    model = ov.Core().read_model(built(folder, cache, ignore) / "openvino_model.xml")
    compiled = ov.Core().compile_model(model, "CPU", EXACT)
    inputs = {
        "input_ids": IDS,
        "attention_mask": np.ones_like(IDS),
        "position_ids": np.arange(IDS.shape[1])[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    logits: Array = compiled(inputs)[0][0]
    return logits


def llama(folder: Path) -> Array:
    """The textbook network, one sequence, in float64."""
    config = json.loads((folder / "config.json").read_text())
    if (folder / "model.safetensors").stat().st_size and b'"BF16"' in (folder / "model.safetensors").read_bytes()[:200]:
        weights = _load_bfloat16(folder / "model.safetensors")
    else:
        weights = {name: tensor.astype(np.float64) for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, keys, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]

    def linear(x: Array, name: str) -> Array:
        y: Array = x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)
        return y

    def norm(x: Array, name: str) -> Array:
        y: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{name}.weight"]
        return y

    frequencies = 1 / config["rope_theta"] ** (np.arange(0, size, 2) / size)
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "linear":
        frequencies /= scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        for i, frequency in enumerate(frequencies):
            wavelength = 2 * math.pi / frequency
            old = scaling["original_max_position_embeddings"]
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if wavelength > old / low:
                frequencies[i] = frequency / scaling["factor"]
            elif wavelength >= old / high:
                smooth = (old / wavelength - low) / (high - low)
                frequencies[i] = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
    angles = np.arange(IDS.shape[1])[:, None] * frequencies
    cos, sin = np.cos(np.concatenate([angles, angles], -1)), np.sin(np.concatenate([angles, angles], -1))

    def rotate(x: Array) -> Array:
        first, second = np.split(x, 2, -1)
        y: Array = x * cos + np.concatenate([-second, first], -1) * sin
        return y

    x = weights["model.embed_tokens.weight"][IDS[0]]
    count = len(x)
    mask = np.where(np.tril(np.ones((count, count))), 0, -np.inf)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        h = norm(x, f"{prefix}.input_layernorm")
        q, k, v = (
            linear(h, f"{prefix}.self_attn.{name}_proj").reshape(count, n, size).transpose(1, 0, 2)
            for name, n in (("q", heads), ("k", keys), ("v", keys))
        )
        k, v = (np.repeat(t, heads // keys, 0) for t in (rotate(k), v))
        scores = rotate(q) @ k.transpose(0, 2, 1) / math.sqrt(size) + mask
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        x = x + linear((attention @ v).transpose(1, 0, 2).reshape(count, -1), f"{prefix}.self_attn.o_proj")
        h = norm(x, f"{prefix}.post_attention_layernorm")
        gate = linear(h, f"{prefix}.mlp.gate_proj")
        gated = gate / (1 + np.exp(-gate)) * linear(h, f"{prefix}.mlp.up_proj")
        x = x + linear(gated, f"{prefix}.mlp.down_proj")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits: Array = norm(x, "model.norm") @ head.T
    return logits


def _load_bfloat16(path: Path) -> dict[str, Array]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    result = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        begin, end = entry["data_offsets"]
        halves = np.frombuffer(data[8 + size + begin : 8 + size + end], np.uint16).astype(np.uint32) << 16
        result[name] = halves.view(np.float32).reshape(entry["shape"]).astype(np.float64)
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "F16"},
        {"dtype": "BF16"},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"attention_bias": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=lambda changes: " ".join(changes) or "plain",
)
def test_logits_are_those_of_the_textbook_network(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model", **changes)
    expected = llama(folder)
    np.testing.assert_allclose(run(folder, tmp_path / "cache"), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM.*ALiBi"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "softcapping"),
        ({"hidden_act": "mish"}, "mish"),
        ({"sliding_window": 16}, "sliding"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2}}, "spiral"),
        ({"attention_sinks": 4, "bos_token_id": 0, "muP": None}, "unknown here: attention_sinks"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_other_networks_are_refused_with_a_way_out(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model", **changes)
    with pytest.raises(ModelLoadError, match=rf"{words}.*--engine transformers.*llama.*optimum-cli"):
        built(folder, tmp_path / "cache", ignore)
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelLoadError, match=r"model\.layers\.2\..*complete"):
        built(folder, tmp_path / "cache", ignore)


def test_weights_without_a_place_are_refused(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    more = np.ones(16, np.float32)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": more}, folder / "model.safetensors")
    built(folder, tmp_path / "cache", ignore)
    save_file({**tensors, "model.layers.1.self_attn.q_norm.weight": more}, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"no place.*layers\.1\.self_attn\.q_norm"):
        built(folder, tmp_path / "cache", ignore)


def test_networks_saved_without_their_head_or_within_another_are_found(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    expected = run(folder, tmp_path / "cache")
    ways = {"": "", "language_model.model.": "vision_tower.x", "model.language_model.": "model.vision_tower.x"}
    for prefix, other in ways.items():
        renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(renamed | ({other: np.ones(1, np.float32)} if other else {}), folder / "model.safetensors")
        np.testing.assert_array_equal(run(folder, tmp_path / "cache"), expected)


def test_a_built_model_is_found_again_until_its_source_changes(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "model")
    cache = tmp_path / "cache"
    told: list[str] = []
    first = built(folder, cache, lambda what, _: told.append(what))
    assert told
    told.clear()
    assert built(folder, cache, lambda what, _: told.append(what)) == first
    assert not told
    tiny.llama(tmp_path / "model", seed=1, head_dim=32)
    assert built(folder, cache, lambda what, _: told.append(what)) != first
    assert (first / "tokenizer.json").is_file()
