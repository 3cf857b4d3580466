"""GGUF files as a source of weights: llama.cpp's names and blocks, turned into Hugging Face's names and `Packed`.

The blocks' layouts are those that ggml defines; what comes out is, up to the rounding of float32, what it would compute
from them. The names and the order of the rows follow llama.cpp's converter, undone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from penstock.core.errors import ModelLoadError
from penstock.engines.openvino.ir.packed import Packed, with_minimum
from penstock.engines.openvino.ir.weights import Plain
from penstock.engines.text.gguf import GgufFile

Bytes = npt.NDArray[Any]  # of uint8
Type = gguf.GGMLQuantizationType

# ------------------------------------------------------------------------------------------ the config


@dataclass(frozen=True)
class Family:
    """What a ``general.architecture`` is for Hugging Face's library.

    ``paired``: its queries and keys have the two numbers that are rotated together side by side, not half a head
    apart. ``names``: of the tensors of its layers, where they differ from `_LAYER_NAMES`. ``numbers``: what its config
    has besides the sizes, by the names there, with the names in the metadata. ``unrotated``: every so-manieth layer
    has no positions.
    """

    architecture: str
    paired: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    unrotated: int = 0


#: Others are refused.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", paired=True),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM", paired=True, unrotated=4),
    "granite": Family(
        "GraniteForCausalLM",
        paired=True,
        numbers={
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        names={"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
    ),
}


def refused(file: Path, why: str) -> ModelLoadError:
    return ModelLoadError(
        f"{file} cannot be served by this engine: {why}. The llama engine reads it (pip install 'penstock[llama]', "
        "then --engine llama)."
    )


class GgufWeights:
    """A `penstock.engines.openvino.ir.weights.Source`."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        if file.architecture not in FAMILIES:
            raise refused(file.path, f"its architecture is {file.architecture!r}")
        self._family = family = FAMILIES[file.architecture]
        if file.get("split.count", 1) > 1:
            raise refused(file.path, "it is one of several files that belong together")
        self.config = _config(file, family)
        self._heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        self._tensors: dict[str, Any] = {}
        for name, tensor in file.tensors.items():
            if name == "rope_freqs.weight":
                factors = _numbers(tensor).tolist()
                self.config["rope_parameters"] |= {"rope_type": "divided", "factors": factors}
                continue
            ours = _name(name, family)
            if ours is None:
                raise refused(file.path, f"it has a tensor {name!r}")
            if tensor.tensor_type not in _UNPACKED and tensor.tensor_type not in _PLAIN:
                raise refused(file.path, f"{name!r} is stored as {tensor.tensor_type.name}")
            self._tensors[ours] = tensor
        self.config["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise refused(file.path, "it has no embedding")
        self.config["vocab_size"] = int(embedding.shape[1])
        matrices = [tensor for tensor in self._tensors.values() if len(tensor.shape) > 1]
        self.kind = file.precision if any(tensor.tensor_type in _UNPACKED for tensor in matrices) else ""

    def names(self) -> Iterable[str]:
        return self._tensors

    def read(self, name: str) -> Plain | Packed:
        tensor = self._tensors[name]
        shape = [int(size) for size in reversed(tensor.shape)]
        data = tensor.data.reshape(shape[0], -1)
        part = name.split(".")[-2]
        if self._family.paired and part in self._heads:
            data = _halves(data, self._heads[part])
        if (kind := _PLAIN.get(tensor.tensor_type)) is not None:
            return Plain(np.ascontiguousarray(data).view(kind).reshape(shape))
        return _UNPACKED[tensor.tensor_type](np.ascontiguousarray(data), shape[0])


def _numbers(tensor: Any) -> Any:
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1)


def _config(file: GgufFile, family: Family) -> dict[str, Any]:
    """What the file says of its network, as a config.json would."""

    def number(name: str) -> Any:
        value = file.of_model(name, None)
        if not isinstance(value, int | float):
            raise refused(file.path, f"its metadata lack {file.architecture}.{name}")
        return value

    hidden, heads = number("embedding_length"), number("attention.head_count")
    head = file.of_model("attention.key_length", None) or hidden // heads
    if file.of_model("attention.value_length", head) != head:
        raise refused(file.path, "its keys and values differ in size")
    if file.of_model("expert_count", 0):
        raise refused(file.path, "it is a mixture of experts")
    rotated = file.of_model("rope.dimension_count", head)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.of_model("attention.head_count_kv", heads),
        "head_dim": head,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": number("context_length"),
        "rope_parameters": {"rope_theta": file.of_model("rope.freq_base", 10_000.0), **_rope_scaling(file)},
    }
    config |= {ours: number(theirs) for ours, theirs in family.numbers.items()}
    if family.unrotated:
        config["no_rope_layers"] = [int((i + 1) % family.unrotated != 0) for i in range(config["num_hidden_layers"])]
    if rotated != head:
        config["partial_rotary_factor"] = rotated / head
    if (window := file.of_model("attention.sliding_window", 0)) > 0:
        config["sliding_window"] = window
    return config


def _rope_scaling(file: GgufFile) -> dict[str, Any]:
    kind = file.of_model("rope.scaling.type", "none")
    factor = file.of_model("rope.scaling.factor", 0.0) or file.of_model("rope.scale_linear", 0.0)
    if kind == "none" or not factor:
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    raise refused(file.path, f"its rotary scaling is {kind!r}")


_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _name(name: str, family: Family) -> str | None:
    """Hugging Face's name of a tensor; None where there is none."""
    base, _, kind = name.rpartition(".")
    if (layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", base)) is not None:
        ours = family.names.get(layer[2]) or _LAYER_NAMES.get(layer[2])
        return f"model.layers.{layer[1]}.{ours}.{kind}" if ours else None
    return f"{_NAMES[base]}.{kind}" if base in _NAMES else None


def _halves(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The rows of a head in the order of Hugging Face's library: first all first numbers of the rotated pairs."""
    count = len(rows)
    return rows.reshape(heads, count // heads // 2, 2, -1).swapaxes(1, 2).reshape(count, -1)


# ------------------------------------------------------------------------------------------ the blocks
# Each of these takes [rows, bytes]. A block holds 32 (the K kinds: 256) weights of a row.

_PLAIN = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: np.uint16}


def _half(data: Bytes) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _blocks(data: Bytes, size: int, *parts: int) -> list[Bytes]:
    """[rows × blocks, part] for each part of a block; the last one is the rest."""
    return np.split(data.reshape(-1, size), np.cumsum(parts), axis=1)


def _nibbles(data: Bytes, run: int) -> Bytes:
    """Low halves of each *run* of bytes, then their high halves."""
    runs = data.reshape(len(data), -1, 1, run) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    return (runs & 15).reshape(len(data), -1)


def _fifth_bits(data: Bytes) -> Bytes:
    """32 bits, little endian, one a weight, as 0 or 16."""
    return np.unpackbits(data, axis=1, bitorder="little") << 4


def _q4_0(data: Bytes, rows: int) -> Packed:
    scale, codes = _blocks(data, 18, 2)
    return Packed(_signed(_nibbles(codes, 16), 8, rows), 4, _half(scale).reshape(rows, -1))


def _q4_1(data: Bytes, rows: int) -> Packed:
    scale, minimum, codes = _blocks(data, 20, 2, 2)
    return _minimum(_nibbles(codes, 16), 4, _half(scale), _half(minimum), rows)


def _q5_0(data: Bytes, rows: int) -> Packed:
    scale, fifth, codes = _blocks(data, 22, 2, 4)
    return Packed(_signed(_nibbles(codes, 16) | _fifth_bits(fifth), 16, rows), 8, _half(scale).reshape(rows, -1))


def _q5_1(data: Bytes, rows: int) -> Packed:
    scale, minimum, fifth, codes = _blocks(data, 24, 2, 2, 4)
    return _minimum(_nibbles(codes, 16) | _fifth_bits(fifth), 8, _half(scale), _half(minimum), rows)


def _q8_0(data: Bytes, rows: int) -> Packed:
    scale, codes = _blocks(data, 34, 2)
    return Packed(np.ascontiguousarray(codes).view(np.int8).reshape(rows, -1), 8, _half(scale).reshape(rows, -1))


def _q4_k(data: Bytes, rows: int) -> Packed:
    whole, minimum, scales, codes = _blocks(data, 144, 2, 2, 12)
    scale, least = _six_bits(scales)
    return _minimum(_nibbles(codes, 32), 4, _half(whole) * scale, -_half(minimum) * least, rows)


def _q5_k(data: Bytes, rows: int) -> Packed:
    whole, minimum, scales, fifth, codes = _blocks(data, 176, 2, 2, 12, 32)
    scale, least = _six_bits(scales)
    # Bit i of byte j belongs to weight j of the i-th 32.
    high = (fifth[:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None] & 1) << 4
    codes = _nibbles(codes, 32) | high.reshape(len(high), -1)
    return _minimum(codes, 8, _half(whole) * scale, -_half(minimum) * least, rows)


def _q6_k(data: Bytes, rows: int) -> Packed:
    low, high, scales, whole = _blocks(data, 210, 128, 64, 16)
    codes = _nibbles(low, 64)
    pairs = high.reshape(len(high), 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1) & 3
    codes = codes | pairs.reshape(len(high), -1) << 4
    scale = _half(whole) * np.ascontiguousarray(scales).view(np.int8)
    return Packed(_signed(codes, 32, rows), 8, scale.reshape(rows, -1))


def _six_bits(data: Bytes) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Eight scales and eight minima of 6 bits in 12 bytes: four of each in the lower bits of 8 bytes; of the other four
    the lower halves in the last 4 bytes, the upper bits on top of the first ones."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = np.hstack([first & 63, third & 15 | first >> 2 & 48])
    minima = np.hstack([second & 63, third >> 4 | second >> 2 & 48])
    return scales.astype(np.float32), minima.astype(np.float32)


def _signed(codes: Bytes, origin: int, rows: int) -> npt.NDArray[np.int8]:
    return (codes.view(np.int8) - np.int8(origin)).reshape(rows, -1)


def _minimum(codes: Bytes, bits: int, scale: Any, minimum: Any, rows: int) -> Packed:
    return with_minimum(codes.reshape(rows, -1), bits, scale.reshape(rows, -1), minimum.reshape(rows, -1))


_UNPACKED: dict[Any, Callable[[Bytes, int], Packed]] = {
    Type.Q4_0: _q4_0,
    Type.Q4_1: _q4_1,
    Type.Q5_0: _q5_0,
    Type.Q5_1: _q5_1,
    Type.Q8_0: _q8_0,
    Type.Q4_K: _q4_k,
    Type.Q5_K: _q5_k,
    Type.Q6_K: _q6_k,
}
