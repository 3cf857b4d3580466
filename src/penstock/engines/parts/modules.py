"""How the vectors of a text's tokens become the text's vector, as sentence-transformers writes it beside a model.

``modules.json`` lists what runs one after the other: the network itself (`Transformer`), `Pooling` over its tokens, and
then any `Dense` layers and `Normalize`. All of it is obeyed, whichever engine computes the network; what is not known
here is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from penstock.core.errors import ModelLoadError
from penstock.engines.parts.sampling import Floats, Ints
from penstock.engines.text.model import read_json

MODULES = "modules.json"
#: What each mode is called in ``1_Pooling/config.json``, in the order in which vectors of several are joined.
_POOLING_FIELDS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


# ------------------------------------------------------------------------------------------ pooling


def _cls(hidden: Floats, mask: Floats) -> Any:
    return hidden[:, 0]


def _last(hidden: Floats, mask: Floats) -> Any:
    return hidden[np.arange(len(hidden)), mask.sum(axis=1).astype(np.int64) - 1]


def _max(hidden: Floats, mask: Floats) -> Any:
    return np.where(mask[:, :, None] > 0, hidden, -np.inf).max(axis=1).astype(np.float32)


def _weighted(hidden: Floats, weights: Floats) -> Any:
    return np.einsum("bts,bt->bs", hidden, weights)


def _mean(hidden: Floats, mask: Floats) -> Any:
    return _weighted(hidden, mask / mask.sum(axis=1, keepdims=True))


def _mean_sqrt(hidden: Floats, mask: Floats) -> Any:
    return _weighted(hidden, mask / np.sqrt(mask.sum(axis=1, keepdims=True)))


def _weighted_mean(hidden: Floats, mask: Floats) -> Any:
    places = mask * np.arange(1, mask.shape[1] + 1, dtype=np.float32)
    return _weighted(hidden, places / places.sum(axis=1, keepdims=True))


_POOLINGS: dict[str, Callable[[Floats, Floats], Any]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
    "last": _last,
}


# ------------------------------------------------------------------------------------------ layers behind it


def _normalized(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    normalized: Floats = vectors / np.maximum(lengths, 1e-12)
    return normalized


_ACTIVATIONS: dict[str, Callable[[Floats], Any]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@dataclass(frozen=True)
class _Dense:
    weight: Floats  # [out, in]
    bias: Floats | float
    activation: Callable[[Floats], Any]

    def __call__(self, vectors: Floats) -> Floats:
        result: Floats = self.activation(vectors @ self.weight.T + self.bias)
        return result

    @classmethod
    def load(cls, folder: Path) -> _Dense:
        config = read_json(folder / "config.json")
        unknown = sorted(name for name in ("use_residual",) if config.get(name))
        places = {config.get(name) or "sentence_embedding" for name in ("module_input_name", "module_output_name")}
        if unknown or places != {"sentence_embedding"}:
            raise ModelLoadError(
                f"{folder} is a Dense layer with {', '.join([*unknown, *sorted(places)])}: not served."
            )
        activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        function = _ACTIVATIONS.get(activation.rpartition(".")[2]) if activation.startswith("torch.nn.") else None
        if function is None:
            raise ModelLoadError(
                f"{folder} is a Dense layer with the activation {activation}; known here: {', '.join(_ACTIVATIONS)}."
            )
        file = folder / "model.safetensors"
        if not file.is_file():
            raise ModelLoadError(
                f"{folder} is a Dense layer without a model.safetensors. Pickles (pytorch_model.bin) are not loaded, "
                "since they can run code: convert it to safetensors."
            )
        tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(file).items()}
        wanted = {"linear.weight"} | ({"linear.bias"} if config.get("bias", True) else set())
        if tensors.keys() != wanted:
            raise ModelLoadError(
                f"{file} has the tensors {', '.join(sorted(tensors))}, not {', '.join(sorted(wanted))}."
            )
        return cls(tensors["linear.weight"], tensors.get("linear.bias", 0.0), function)


# ------------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Modules:
    """What is done with the output of the network. ``poolings``: the modes, whose vectors are joined; ``layers``: what
    follows on a text's vector."""

    poolings: tuple[str, ...]
    layers: tuple[Callable[[Floats], Floats], ...] = ()
    include_prompt: bool = True
    """False: the tokens of a prompt before a text have no part in its vector."""

    def __call__(self, hidden: Floats, mask: Ints) -> Floats:
        """One vector a text, [texts, dimensions], of the vectors of its tokens, *hidden* ([texts, tokens, size]).
        *mask* is 1 where there is a token and 0 where there is padding (on the right)."""
        there = mask.astype(np.float32)
        vectors = np.concatenate([_POOLINGS[mode](hidden, there) for mode in self.poolings], axis=1)
        for layer in self.layers:
            vectors = layer(vectors)
        return vectors

    def dimensions(self, size: int) -> int:
        """Of a vector, where those of tokens have *size*. Raises `ModelLoadError` where the layers do not fit."""
        size *= len(self.poolings)
        for layer in self.layers:
            if isinstance(layer, _Dense):
                if layer.weight.shape[1] != size:
                    raise ModelLoadError(
                        f"A Dense layer takes vectors of {layer.weight.shape[1]} dimensions, but they have {size}."
                    )
                size = layer.weight.shape[0]
        return size


def embeds(folder: Path) -> bool:
    """Is it a folder of sentence-transformers?"""
    return (folder / MODULES).is_file() or (folder / "1_Pooling" / "config.json").is_file()


def modules_of(folder: Path, pooling: str = "auto") -> Modules:
    """What *folder* says; *pooling*: what the operator says instead of its mode. Raises `ModelLoadError`.

    Whether the vectors that come out last have the length 1 is left to the option ``normalize``.
    """
    if not (folder / MODULES).is_file():
        return _pooled(folder / "1_Pooling", pooling)
    listed = _listed(folder)
    kinds = [kind for kind, _ in listed]
    after = kinds[2:]
    if strange := sorted({*kinds} - {"Transformer", "Pooling", "Dense", "Normalize"}):
        raise ModelLoadError(f"{folder / MODULES} asks for {', '.join(strange)}, which cannot be served.")
    if kinds[:2] != ["Transformer", "Pooling"] or {*after} & {"Transformer", "Pooling"}:
        raise ModelLoadError(
            f"{folder / MODULES} has {', '.join(kinds)}; what can be served is a Transformer, a Pooling, then Dense "
            "and Normalize."
        )
    if listed[0][1] != folder:
        raise ModelLoadError(
            f"The network of {folder} is in {listed[0][1].name}: put its config.json, tokenizer.json and weights "
            f"beside {MODULES}."
        )
    pooled = _pooled(listed[1][1], pooling)
    layers = [_Dense.load(place) if kind == "Dense" else _normalized for kind, place in listed[2:]]
    while layers and layers[-1] is _normalized:
        layers.pop()
    return Modules(pooled.poolings, tuple(layers), pooled.include_prompt)


def module_files(folder: Path) -> list[str]:
    """The files of *folder* that `modules_of` reads, relative to it."""
    places = [place for kind, place in _listed(folder)[1:]] if (folder / MODULES).is_file() else [folder / "1_Pooling"]
    files = [folder / MODULES, *(place / name for place in places for name in ("config.json", "model.safetensors"))]
    return [str(file.relative_to(folder)) for file in files if file.is_file()]


def _listed(folder: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of each module."""
    try:
        listed = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        found = [(str(each["type"]).rpartition(".")[2], (folder / str(each["path"])).resolve()) for each in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{folder / MODULES} cannot be read: {error!r}") from error
    if any(not place.is_relative_to(folder.resolve()) for _, place in found):
        raise ModelLoadError(f"{folder / MODULES} names a folder outside of it.")
    return [(kind, folder / place.relative_to(folder.resolve())) for kind, place in found]


def _pooled(place: Path, pooling: str) -> Modules:
    written: dict[str, Any] = read_json(place / "config.json")
    include_prompt = bool(written.get("include_prompt", True))
    if pooling != "auto":
        return Modules((pooling,), include_prompt=include_prompt)
    given = written.get("pooling_mode")
    modes: Sequence[Any] = (
        [given]
        if isinstance(given, str)
        else given or [mode for field, mode in _POOLING_FIELDS.items() if written.get(field)]
    )
    if strange := [str(mode) for mode in modes if mode not in _POOLINGS]:
        raise ModelLoadError(f"{place} asks for the pooling {', '.join(strange)}; known: {', '.join(_POOLINGS)}.")
    if not modes:
        raise ModelLoadError(
            f"{place.parent} does not say how a text's vector is made of its tokens' ({place.name}/config.json). The "
            "model's page does: --option pooling=cls (as bge, arctic-embed), mean (as e5, MiniLM, gte) or last (as "
            "Qwen3-Embedding)."
        )
    return Modules(tuple(map(str, modes)), include_prompt=include_prompt)
