"""LoRA adapters: small changes of a model's weights, each of them a model of its own to who asks for it.

``--option adapters=NAME=PATH[,NAME=PATH…]`` serves them beside the model, which they share everything else with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.errors import ModelLoadError
from penstock.core.ports import ModelInfo

OPTION = "adapters"
CONFIG = "adapter_config.json"


def parse_adapters(text: str) -> dict[str, Path]:
    """Name → path, in the order in which they are given. Raises `ModelLoadError`."""
    found: dict[str, Path] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, _, path = part.partition("=")
        if not name or not path:
            raise ModelLoadError(f"Option adapters is NAME=PATH, several separated by commas, not {part!r}.")
        if name in found:
            raise ModelLoadError(f"Option adapters has two adapters {name!r}.")
        found[name] = Path(path).expanduser()
    return found


def adapter_names(options: Mapping[str, str]) -> tuple[str, ...]:
    """Of the adapters that an engine's *options*, as the operator typed them, ask for."""
    return tuple(parse_adapters(str(options.get(OPTION, ""))))


def served(info: ModelInfo, adapters: tuple[str, ...]) -> tuple[ModelInfo, ...]:
    """What is told of a model and of its *adapters*."""
    return (info, *(msgspec.structs.replace(info, name=name, parent=info.name) for name in adapters))


def check_folders(text: str) -> dict[str, Path]:
    """As `parse_adapters`, of adapters that are folders as peft saves them."""
    adapters = parse_adapters(text)
    for name, folder in adapters.items():
        if not (folder / CONFIG).is_file() or not (folder / "adapter_model.safetensors").is_file():
            raise ModelLoadError(
                f"The adapter {name!r} is a folder with {CONFIG} and adapter_model.safetensors, as peft saves it; "
                f"{folder} is none."
            )
    return adapters


def check_files(text: str) -> dict[str, Path]:
    """As `parse_adapters`, of adapters that are GGUF files."""
    adapters = parse_adapters(text)
    for name, file in adapters.items():
        if not file.is_file():
            raise ModelLoadError(
                f"The adapter {name!r} is a GGUF file, and there is none at {file}. llama.cpp's "
                "convert_lora_to_gguf.py makes one of a folder that peft has saved."
            )
    return adapters


def refuse_as_model(folder: Path) -> None:
    """Raise `ModelLoadError` for a folder that is an adapter, and no model."""
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        try:
            written: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            base = written.get("base_model_name_or_path") or "its base model"
        except (OSError, ValueError, AttributeError):
            base = "its base model"
        raise ModelLoadError(
            f"{folder} is a LoRA adapter, not a model. Serve it beside {base}: --engine transformers (or vllm) --model "
            f"NAME={base} --option adapters=ADAPTER={folder}"
        )
