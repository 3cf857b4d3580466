"""Builds an OpenVINO model of a text encoder: BERT, RoBERTa and XLM-RoBERTa (bge, e5, gte, MiniLM, arctic-embed …).

They are the same network up to where positions begin. Whatever else a config asks for is refused, as for Llamas
(`penstock.engines.openvino.ir`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from penstock.core.errors import ModelLoadError
from penstock.engines.openvino.ov import ov

op = ov.opset13

#: The architectures, and what the names of their tensors may begin with.
PREFIXES = {
    "BertModel": ("", "bert."),
    "BertForMaskedLM": ("bert.",),
    "RobertaModel": ("", "roberta."),
    "RobertaForMaskedLM": ("roberta.",),
    "XLMRobertaModel": ("", "roberta."),
}


class _Shape:
    """The numbers of a config, checked."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise _unbuildable(f"its positions are {config['position_embedding_type']!r}")
        if config.get("is_decoder") or config.get("quantization_config"):
            raise _unbuildable("it is a decoder, or its weights are quantized")
        self.layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.head = int(config["hidden_size"]) // self.heads
        self.epsilon = float(config.get("layer_norm_eps", 1e-12))
        self.activation = str(config.get("hidden_act", "gelu"))
        if self.activation not in _ACTIVATIONS:
            raise _unbuildable(f"its activation is {self.activation}")
        # RoBERTa's positions begin behind that of the padding token.
        offset = "roberta" in config.get("model_type", "bert")
        self.first_position = int(config.get("pad_token_id", 1)) + 1 if offset else 0


def _unbuildable(why: str) -> ModelLoadError:
    return ModelLoadError(
        f"This encoder cannot be converted here: {why}. Export it with optimum-intel "
        "(optimum-cli export openvino --task feature-extraction --model MODEL FOLDER) and serve that folder."
    )


_ACTIVATIONS = {
    "gelu": lambda x: op.gelu(x, "erf"),
    "gelu_new": lambda x: op.gelu(x, "tanh"),
    "gelu_pytorch_tanh": lambda x: op.gelu(x, "tanh"),
    "relu": op.relu,
}


def build_encoder(config: Mapping[str, Any], weights: Any) -> Any:
    """The ``ov.Model``: ``input_ids`` and ``attention_mask``, [texts, tokens] and padded on the right, to
    ``last_hidden_state``, [texts, tokens, size]. *weights* as for
    `penstock.engines.openvino.ir.decoder.build_decoder`."""
    shape = _Shape(config)
    architecture = config["architectures"][0]
    prefix = next(
        (each for each in PREFIXES[architecture] if f"{each}embeddings.word_embeddings.weight" in weights), ""
    )
    network = _Network(shape, weights, prefix)
    ids, mask = _input("input_ids"), _input("attention_mask")
    x = network.embedded(ids)
    hidden = network.hidden(mask)
    for layer in range(shape.layers):
        x = network.block(x, hidden, f"encoder.layer.{layer}")
    x.output(0).set_names({"last_hidden_state"})
    return ov.Model([op.result(x)], [ids, mask], "encoder")


def _input(name: str) -> Any:
    node = op.parameter([-1, -1], ov.Type.i64, name=name)
    node.output(0).set_names({name})
    return node


def _constant(value: Any, dtype: type = np.int64) -> Any:
    return op.constant(np.array(value, dtype=dtype))


class _Network:
    """The layers. Activations are [texts, tokens, size]."""

    def __init__(self, shape: _Shape, weights: Any, prefix: str) -> None:
        self._shape = shape
        self._weights = weights
        self._prefix = prefix

    def _tensor(self, name: str) -> Any:
        return self._weights.constant(self._prefix + name)

    def embedded(self, ids: Any) -> Any:
        zero, one = _constant(0), _constant(1)
        tokens = op.gather(op.shape_of(ids), one, zero)
        first = _constant(self._shape.first_position)
        positions = op.range(first, op.add(first, tokens), one, "i64")
        x = op.gather(self._tensor("embeddings.word_embeddings.weight"), ids, zero)
        x = op.add(x, op.gather(self._tensor("embeddings.token_type_embeddings.weight"), zero, zero))
        x = op.add(x, op.gather(self._tensor("embeddings.position_embeddings.weight"), positions, zero))
        return self._norm(x, "embeddings.LayerNorm")

    def hidden(self, mask: Any) -> Any:
        """[texts, 1, 1, tokens]: very negative where there is padding, else 0."""
        mask = op.unsqueeze(op.convert(mask, "boolean"), _constant([1, 2]))
        return op.select(mask, _constant(0.0, np.float32), _constant(-65504.0, np.float32))

    def block(self, x: Any, hidden: Any, name: str) -> Any:
        shape = self._shape
        query, key, value = (
            self._heads(self._linear(x, f"{name}.attention.self.{part}")) for part in ("query", "key", "value")
        )
        scale = _constant(1 / math.sqrt(shape.head), np.float32)
        out = op.scaled_dot_product_attention(query, key, value, hidden, scale, causal=False)
        merged = op.reshape(
            op.transpose(out, _constant([0, 2, 1, 3])), _constant([0, 0, shape.heads * shape.head]), True
        )
        attended = self._linear(merged, f"{name}.attention.output.dense")
        x = self._norm(op.add(x, attended), f"{name}.attention.output.LayerNorm")
        inner = _ACTIVATIONS[shape.activation](self._linear(x, f"{name}.intermediate.dense"))
        return self._norm(op.add(x, self._linear(inner, f"{name}.output.dense")), f"{name}.output.LayerNorm")

    def _heads(self, x: Any) -> Any:
        """[texts, heads, tokens, head]."""
        x = op.reshape(x, _constant([0, 0, self._shape.heads, self._shape.head]), True)
        return op.transpose(x, _constant([0, 2, 1, 3]))

    def _linear(self, x: Any, name: str) -> Any:
        return op.add(op.matmul(x, self._tensor(f"{name}.weight"), False, True), self._tensor(f"{name}.bias"))

    def _norm(self, x: Any, name: str) -> Any:
        normed = op.mvn(x, _constant([-1]), True, self._shape.epsilon, "INSIDE_SQRT")
        return op.add(op.multiply(normed, self._tensor(f"{name}.weight")), self._tensor(f"{name}.bias"))
