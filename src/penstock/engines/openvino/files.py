"""The files of a model for OpenVINO: as they are, or built from safetensors or a .gguf file, once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from penstock.core.errors import ModelLoadError
from penstock.engines.adapters import refuse_as_model
from penstock.engines.frames import Progress
from penstock.engines.models import BUNDLED, HUB_NAME, check_tokenizer, download, local_place
from penstock.engines.text.model import read_json

IR_NAMES = ("openvino_model.xml", "openvino_language_model.xml")


@dataclass(frozen=True)
class ModelFiles:
    """``ir``: the network's .xml; ``text``: the folder with tokenizer.json and the configs. ``exported``: somebody else
    made the network."""

    ir: Path
    text: Path
    exported: bool = False


def cache_folder() -> Path:
    """Where converted models are kept. ``PENSTOCK_CACHE`` moves it."""
    given = os.environ.get("PENSTOCK_CACHE")
    return Path(given) if given else user_cache_path("penstock")


def resolve(name: str, path: str | None, progress: Progress, cache: Path | None = None) -> ModelFiles:
    """The files of a model: a bundled name, a folder (OpenVINO or safetensors), a .gguf file, or a hub name.

    Raises `ModelLoadError` that says what to do.
    """
    cache = cache or cache_folder()
    place = find(name, path) or _checked(download(path or name, progress))
    if place.is_dir():
        for ir in IR_NAMES:
            if (place / ir).is_file():
                return ModelFiles(place / ir, place, exported=True)
    from penstock.engines.openvino.ir import built  # imports OpenVINO: not in the server

    target = built(place, cache / "ir", progress)
    return ModelFiles(target / "openvino_model.xml", target)


def find(name: str, path: str | None) -> Path | None:
    """Where such a model is: a folder or a .gguf file; None where it has to be downloaded.

    Raises `ModelLoadError` that says what to do.
    """
    wanted = path or name
    place = local_place(name, path)
    if place.is_dir():
        return _checked(place)
    if place.suffix == ".gguf":
        if not place.is_file():
            raise ModelLoadError(f"There is no file {place}.")
        return place
    if HUB_NAME.fullmatch(wanted) and not place.exists():
        return None
    bundled = sorted(folder.name for folder in BUNDLED.iterdir() if (folder / "config.json").is_file())
    raise ModelLoadError(
        f"There is no model {wanted!r}. Give a folder with an OpenVINO or safetensors model, a .gguf file, a name "
        f"on the hub (organisation/name){', or ' + ' or '.join(bundled) if bundled else ''}: --model NAME=PATH."
    )


def _checked(folder: Path) -> Path:
    refuse_as_model(folder)
    if not any((folder / name).is_file() for name in IR_NAMES) and not any(folder.glob("*.safetensors")):
        raise ModelLoadError(
            f"{folder} has neither openvino_model.xml nor *.safetensors. Weights in other formats have to be exported "
            "first, for instance with optimum-intel: optimum-cli export openvino --model MODEL FOLDER."
        )
    check_tokenizer(folder)
    return folder


def even_context(files: ModelFiles, context: int) -> int:
    """How many of *context* tokens a request may have so that its reply does not depend on who runs beside it.

    An exported network with LongRoPE (Phi-3.5, Phi-4-mini) chooses the frequencies of all texts that it computes by the
    longest of them. Up to the length that the model was first trained with it has no choice.
    """
    config = read_json(files.text / "config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not files.exported or "long_factor" not in rope:
        return context
    return min(context, int(rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]))
