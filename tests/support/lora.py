"""LoRA adapters of tiny models, as peft saves them, with random weights that change a reply."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def adapter(base: Path, folder: Path, *, seed: int = 1, **changes: Any) -> Path:
    """An adapter of the model in *base*. *changes*: of peft's ``LoraConfig``."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes})
    model = _quietly(get_peft_model, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=random) * 0.3)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """The folder of a model with the adapter in its weights, as peft merges it."""
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = _quietly(PeftModel.from_pretrained, whole, str(adapter))
    model.merge_and_unload().save_pretrained(folder)
    return folder


def _quietly(make: Callable[..., Any], *given: Any) -> Any:
    """It uses what the library will take away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return make(*given)
