"""A tiny random BERT with its tokenizer, made on the spot, and what its vectors must be: computed in numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZE, HEADS, LAYERS, INNER, CONTEXT = 48, 4, 2, 80, 64
TEXTS = [
    "the mill turns and the water falls over the wheel",
    "submit once, stream anywhere, lose nothing",
    "größer, naïve, Ελλάδα and the river",
    "water",
    "a little fox ran to the river and the old mill by the sea, where the wheel turns",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]

Floats = np.ndarray[Any, np.dtype[np.float32]]


def word_piece() -> Tokenizer:
    """As BERT's: lower case, and ``[CLS] … [SEP]`` around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def encoder(folder: Path, *, pooling: str | None = "mean", seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with a BERT, and what sentence-transformers would say of its *pooling*."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = word_piece()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": CONTEXT,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        **changes,
    }
    _write(folder / "config.json", config)
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    _write(folder / "tokenizer_config.json", {**names, "tokenizer_class": "BertTokenizer"})
    if pooling is not None:
        fields = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
        _write(
            folder / "1_Pooling/config.json",
            {f"pooling_mode_{name}": kind == pooling for kind, name in fields.items()}
            | {"word_embedding_dimension": SIZE},
        )
    save_file(_weights(config, seed), folder / "model.safetensors")
    return folder


def with_modules(folder: Path, *kinds: str, **pooling: Any) -> Path:
    """Write what sentence-transformers writes of the modules *kinds* behind the network and its *pooling*: ``Dense``
    (into 24 dimensions first, then 12 …) and others; weights are random."""
    random = np.random.default_rng(3)
    listed = [("Transformer", ""), ("Pooling", "1_Pooling")]
    _write(folder / "1_Pooling/config.json", {"word_embedding_dimension": SIZE, **pooling})
    modes = pooling.get("pooling_mode") or [name for name, on in pooling.items() if on is True]
    size = SIZE * (1 if isinstance(modes, str) else len(modes))
    for index, kind in enumerate(kinds, 2):
        place = f"{index}_{kind}"
        listed.append((kind, place))
        (folder / place).mkdir()
        if kind == "Dense":
            smaller = 24 if size > 24 else size // 2
            activation = "Tanh" if smaller == 24 else "Identity"
            _write(
                folder / place / "config.json",
                {
                    "in_features": size,
                    "out_features": smaller,
                    "bias": smaller == 24,
                    "activation_function": f"torch.nn.modules.activation.{activation}"
                    if activation == "Tanh"
                    else "torch.nn.modules.linear.Identity",
                },
            )
            tensors = {"linear.weight": random.normal(0, 0.3, (smaller, size)).astype(np.float32)}
            if smaller == 24:
                tensors["linear.bias"] = random.normal(0, 0.3, smaller).astype(np.float32)
            save_file(tensors, folder / place / "model.safetensors")
            size = smaller
    names = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(listed)
    ]
    (folder / "modules.json").write_text(json.dumps(names))
    return folder


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def _weights(config: dict[str, Any], seed: int) -> dict[str, Floats]:
    random = np.random.default_rng(seed)
    size, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], size),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], size),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], size),
        "embeddings.LayerNorm": (size,),
        "pooler.dense": (size, size),  # there in checkpoints, of no use here
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{name}.attention.{part}"] = (size, size)
        shapes[f"{name}.attention.output.LayerNorm"] = (size,)
        shapes[f"{name}.intermediate.dense"] = (inner, size)
        shapes[f"{name}.output.dense"] = (size, inner)
        shapes[f"{name}.output.LayerNorm"] = (size,)
    tensors: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name.endswith(".weight"):
            tensors[name] = random.normal(0, 0.5, shape)
        elif name.endswith("LayerNorm"):
            tensors[f"{name}.weight"] = random.normal(1, 0.2, shape)
            tensors[f"{name}.bias"] = random.normal(0, 0.2, shape)
        else:
            tensors[f"{name}.weight"] = random.normal(0, 0.3, shape)
            tensors[f"{name}.bias"] = random.normal(0, 0.2, shape[:1])
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------ what its vectors must be


class Reference:
    """The same network in numpy, in float64, one text at a time and without padding."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._config = json.loads((folder / "config.json").read_text())
        self._tensors = {
            name: tensor.astype(np.float64) for name, tensor in load_file(folder / "model.safetensors").items()
        }

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def hidden(self, ids: Sequence[int]) -> Any:
        """[tokens, size]"""
        first = self._config["pad_token_id"] + 1 if "roberta" in self._config["model_type"] else 0
        x = self._tensors["embeddings.word_embeddings.weight"][list(ids)]
        x = x + self._tensors["embeddings.position_embeddings.weight"][first : first + len(ids)]
        x = self._norm(x + self._tensors["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(self._config["num_hidden_layers"]):
            name = f"encoder.layer.{layer}"
            attended = self._linear(self._attention(x, f"{name}.attention.self"), f"{name}.attention.output.dense")
            x = self._norm(x + attended, f"{name}.attention.output.LayerNorm")
            inner = self._linear(x, f"{name}.intermediate.dense")
            inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
            x = self._norm(x + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        return x

    def vector(self, given: str | Sequence[int], pooling: str = "mean", *, normalize: bool = True) -> Any:
        hidden = self.hidden(self.ids(given) if isinstance(given, str) else given)
        vector = {"mean": hidden.mean(axis=0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        return vector / np.linalg.norm(vector) if normalize else vector

    def vectors(self, given: Iterable[str | Sequence[int]], pooling: str = "mean") -> Any:
        return np.array([self.vector(each, pooling) for each in given])

    def _attention(self, x: Any, name: str) -> Any:
        heads = self._config["num_attention_heads"]
        query, key, value = (
            self._linear(x, f"{name}.{part}").reshape(len(x), heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = weights / weights.sum(axis=-1, keepdims=True) @ value
        return out.transpose(1, 0, 2).reshape(len(x), -1)

    def _linear(self, x: Any, name: str) -> Any:
        return x @ self._tensors[f"{name}.weight"].T + self._tensors[f"{name}.bias"]

    def _norm(self, x: Any, name: str) -> Any:
        mean = x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + self._config["layer_norm_eps"])
        return (x - mean) / scale * self._tensors[f"{name}.weight"] + self._tensors[f"{name}.bias"]
