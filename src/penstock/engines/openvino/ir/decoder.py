"""The network of a decoder.

Llama, Mistral, Qwen2 and Qwen3 are the same network up to biases, head norms and rotary scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from penstock.engines.openvino.ir.refusal import unbuildable
from penstock.engines.openvino.ir.rope import rotary_frequencies
from penstock.engines.openvino.ov import ov

op = ov.opset13

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def _constant(value: Any, dtype: type = np.int64) -> Any:
    return op.constant(np.array(value, dtype=dtype))


def _floats(value: Any) -> Any:
    return _constant(value, np.float32)


class _Shape:
    """The numbers of a config, checked."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        architecture = (config.get("architectures") or ["unknown"])[0]
        if architecture not in ARCHITECTURES:
            raise unbuildable(f"its architecture is {architecture}")
        if config.get("hidden_act", "silu") != "silu":
            raise unbuildable(f"its activation is {config['hidden_act']}")
        if config.get("quantization_config"):
            raise unbuildable("its weights are quantized")
        sliding = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        if sliding and sliding < config.get("max_position_embeddings", 0):
            raise unbuildable("it uses sliding-window attention")
        self.layers = int(config["num_hidden_layers"])
        self.hidden = int(config["hidden_size"])
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head = int(config.get("head_dim") or self.hidden // self.heads)
        self.epsilon = float(config.get("rms_norm_eps", 1e-6))
        self.tied = bool(config.get("tie_word_embeddings", False))
        self.frequencies = rotary_frequencies(config, self.head)


def build_decoder(config: Mapping[str, Any], weights: Any) -> Any:
    """The stateful ``ov.Model`` in the form that OpenVINO's paged-attention transformation (and GenAI) expects.

    *weights* gives a float32 node by name (``constant(name)``) and knows its names (``in``).
    """
    shape = _Shape(config)
    ids = _input("input_ids", [-1, -1], ov.Type.i64)
    attention_mask = _input("attention_mask", [-1, -1], ov.Type.i64)
    positions = _input("position_ids", [-1, -1], ov.Type.i64)
    beams = _input("beam_idx", [-1], ov.Type.i32)
    network = _Network(shape, weights, ids, attention_mask, positions, beams)

    embedding = weights.constant("model.embed_tokens.weight")
    x = op.gather(embedding, op.convert(ids, "i32"), _constant(0))
    for layer in range(shape.layers):
        x = network.block(x, layer)
    x = network.norm(x, "model.norm")
    head = embedding if shape.tied or "lm_head.weight" not in weights else weights.constant("lm_head.weight")
    logits = op.matmul(x, head, False, True)
    logits.output(0).set_names({"logits"})
    return ov.Model([op.result(logits)], network.sinks, [ids, attention_mask, positions, beams], "llama")


def _input(name: str, shape: list[int], kind: Any) -> Any:
    node = op.parameter(shape, kind, name=name)
    node.output(0).set_names({name})
    return node


class _Network:
    """The nodes that all layers share, and the layers. Activations are [batch, tokens, hidden]."""

    def __init__(self, shape: _Shape, weights: Any, ids: Any, mask: Any, positions: Any, beams: Any) -> None:
        self._shape = shape
        self._weights = weights
        self._beams = beams
        self.sinks: list[Any] = []
        self._batch = op.gather(op.shape_of(ids), _constant([0]), _constant(0))
        angles = op.multiply(
            op.unsqueeze(op.convert(positions, "f32"), _constant(2)), _floats(shape.frequencies.reshape(1, 1, -1))
        )
        angles = op.concat([angles, angles], -1)
        self._cos = op.unsqueeze(op.cos(angles), _constant(1))
        self._sin = op.unsqueeze(op.sin(angles), _constant(1))
        self._mask = self._causal_mask(ids, mask)

    def _causal_mask(self, ids: Any, mask: Any) -> Any:
        """[batch, 1, new tokens, all tokens]: 0 where a token may look, very negative elsewhere."""
        new = op.gather(op.shape_of(ids), _constant(1), _constant(0))
        total = op.gather(op.shape_of(mask), _constant(1), _constant(0))
        one = _constant(1)
        rows = op.unsqueeze(op.range(op.subtract(total, new), total, one, "i64"), _constant(1))
        columns = op.unsqueeze(op.range(_constant(0), total, one, "i64"), _constant(0))
        causal = op.unsqueeze(op.less_equal(columns, rows), _constant([0, 1]))
        padding = op.unsqueeze(op.convert(mask, "boolean"), _constant([1, 2]))
        return op.select(op.logical_and(causal, padding), _floats(0.0), _floats(-65504.0))

    def block(self, x: Any, layer: int) -> Any:
        prefix = f"model.layers.{layer}"
        x = op.add(x, self._attention(self.norm(x, f"{prefix}.input_layernorm"), f"{prefix}.self_attn", layer))
        h = self.norm(x, f"{prefix}.post_attention_layernorm")
        gate = op.swish(self._linear(h, f"{prefix}.mlp.gate_proj"))
        up = self._linear(h, f"{prefix}.mlp.up_proj")
        return op.add(x, self._linear(op.multiply(gate, up), f"{prefix}.mlp.down_proj"))

    def _attention(self, x: Any, prefix: str, layer: int) -> Any:
        shape = self._shape
        query = self._heads(self._linear(x, f"{prefix}.q_proj"), shape.heads, f"{prefix}.q_norm")
        key = self._heads(self._linear(x, f"{prefix}.k_proj"), shape.kv_heads, f"{prefix}.k_norm")
        value = self._heads(self._linear(x, f"{prefix}.v_proj"), shape.kv_heads, None)
        # The names pair what is read with what is written; the paged-attention transformation goes by them.
        key = self._cached(self._rotated(key), f"past_key_values.{layer}.keypresent.{layer}.key")
        value = self._cached(value, f"past_key_values.{layer}.valuepresent.{layer}.value")
        scale = _floats(1 / math.sqrt(shape.head))
        out = op.scaled_dot_product_attention(
            self._rotated(query), self._repeated(key), self._repeated(value), self._mask, scale, causal=False
        )
        merged = op.reshape(
            op.transpose(out, _constant([0, 2, 1, 3])), _constant([0, 0, shape.heads * shape.head]), True
        )
        return self._linear(merged, f"{prefix}.o_proj")

    def norm(self, x: Any, name: str) -> Any:
        """Root-mean-square norm over the last axis."""
        mean = op.reduce_mean(op.power(x, _floats(2.0)), _constant(-1), keep_dims=True)
        scale = op.divide(_floats(1.0), op.sqrt(op.add(mean, _floats(self._shape.epsilon))))
        return op.multiply(op.multiply(x, scale), self._weights.constant(f"{name}.weight"))

    def _linear(self, x: Any, name: str) -> Any:
        y = op.matmul(x, self._weights.constant(f"{name}.weight"), False, True)
        return op.add(y, self._weights.constant(f"{name}.bias")) if f"{name}.bias" in self._weights else y

    def _heads(self, x: Any, heads: int, norm: str | None) -> Any:
        """[batch, heads, tokens, head], each head normed where the model has a norm for it (Qwen3)."""
        x = op.reshape(x, _constant([0, 0, heads, self._shape.head]), True)
        if norm is not None and f"{norm}.weight" in self._weights:
            x = self.norm(x, norm)
        return op.transpose(x, _constant([0, 2, 1, 3]))

    def _rotated(self, x: Any) -> Any:
        half = self._shape.head // 2
        one, axis = _constant([1]), _constant([3])
        first = op.slice(x, _constant([0]), _constant([half]), one, axis)
        second = op.slice(x, _constant([half]), _constant([2**31 - 1]), one, axis)
        turned = op.concat([op.multiply(second, _floats(-1.0)), first], -1)
        return op.add(op.multiply(x, self._cos), op.multiply(turned, self._sin))

    def _cached(self, x: Any, name: str) -> Any:
        shape = self._shape
        empty = op.broadcast(_floats(0.0), op.concat([self._batch, _constant([shape.kv_heads, 0, shape.head])], 0))
        past = op.read_value(empty, name, ov.Type.f32, ov.PartialShape([-1, shape.kv_heads, -1, shape.head]))
        whole = op.concat([op.gather(past, self._beams, _constant(0)), x], 2)
        self.sinks.append(op.assign(whole, name))
        return whole

    def _repeated(self, x: Any) -> Any:
        """Each key/value head once per query head that shares it."""
        shape = self._shape
        if shape.kv_heads == shape.heads:
            return x
        tokens = op.gather(op.shape_of(x), _constant([2]), _constant(0))
        target = op.concat(
            [self._batch, _constant([shape.kv_heads, shape.heads // shape.kv_heads]), tokens, _constant([shape.head])],
            0,
        )
        wide = op.broadcast(op.unsqueeze(x, _constant(2)), target)
        return op.reshape(wide, _constant([0, shape.heads, -1, shape.head]), True)
