"""LoRA adapters beside each other: each token goes through that of its own request.

peft reads the files and puts the adapters' matrices into the model. Which of them a token goes through is decided here:
peft can do this for the rows of a batch, and all sequences of ours are one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from penstock.core.errors import ModelLoadError


class Adapters:
    """Those of a model, numbered from 1 in the order of *folders*; 0 is the model without any."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.names = tuple(folders)
        self._folders = folders
        #: Through which all tokens of a call go, …
        self.alone = 0
        #: … or of each number the places in the row whose tokens go through it (None: of all), and how long the row is.
        self.routes: Sequence[tuple[int, torch.Tensor | None]] | None = None
        self.tokens = 0

    def number(self, model: str) -> int:
        """By the name that a request has for it."""
        return self.names.index(model) + 1 if model in self.names else 0

    def attach(self, model: Any) -> None:
        """Put them into *model*. Raises `ModelLoadError` for one that is of another kind than this computes, or does
        not fit."""
        if not self.names:
            return
        from peft.tuners.lora import LoraLayer  # slow to import, and few need it
        from peft.tuners.lora.layer import Linear

        for number, (name, folder) in enumerate(self._folders.items(), 1):
            _check(name, folder)
            try:
                told = model.load_adapter(str(folder), adapter_name=_key(number))
            except Exception as error:  # the library's checks raise whatever they like
                raise ModelLoadError(f"The adapter {name!r} does not fit this model: {error}") from error
            odd = {key for key in told.missing_keys if f".{_key(number)}." in key} | set(told.unexpected_keys)
            if odd:
                raise ModelLoadError(
                    f"The adapter {name!r} does not fit this model: {min(odd)} and {len(odd) - 1} more have no place "
                    "in it, or are not in the adapter's files."
                )
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer):
                if type(module) is not Linear:
                    raise ModelLoadError(f"Adapters of {path}, a {type(module.base_layer).__name__}, cannot be served.")
                setattr(module, "forward", _ByToken(module, self))  # noqa: B010  # a method, to mypy
        model.eval()


def _key(number: int) -> str:
    """What peft calls it: names may have dots, which modules must not."""
    return f"adapter_{number}"


def _check(name: str, folder: Path) -> None:
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # as above
        raise ModelLoadError(f"The adapter {name!r} cannot be read: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ModelLoadError(f"The adapter {name!r} is of the kind {config.peft_type}; LoRA can be served.")
    asked = [
        field
        for field in (
            "use_dora",
            "modules_to_save",
            "trainable_token_indices",
            "target_parameters",
            "layer_replication",
            "lora_bias",
            "alora_invocation_tokens",
            "arrow_config",
            "use_qalora",
        )
        if getattr(config, field, None)
    ]
    if config.bias != "none":
        asked.append("bias")
    if asked:
        raise ModelLoadError(
            f"The adapter {name!r} has {', '.join(asked)}, which cannot be served beside other requests: merge it into "
            "the model's weights (peft's merge_and_unload) and serve those."
        )


class _ByToken:
    """The ``forward`` of a linear layer with adapters."""

    def __init__(self, layer: Any, adapters: Adapters) -> None:
        self._layer = layer
        self._adapters = adapters

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._layer.base_layer(x)
        adapters = self._adapters
        if adapters.routes is None:
            return result + self._change(adapters.alone, x) if adapters.alone else result
        for number, where in adapters.routes:
            if x.shape[-2] != adapters.tokens:
                raise ValueError("an adapter of a layer that does not see all tokens")
            if where is None:
                return result + self._change(number, x)
            result[..., where, :] += self._change(number, x[..., where, :])
        return result

    def _change(self, number: int, x: torch.Tensor) -> torch.Tensor:
        layer, key = self._layer, _key(number)
        if key not in layer.lora_A:
            return x.new_zeros((*x.shape[:-1], layer.out_features))
        down, up = layer.lora_A[key], layer.lora_B[key]
        change: torch.Tensor = up(down(x.to(down.weight.dtype))) * layer.scaling[key]
        return change.to(x.dtype)
