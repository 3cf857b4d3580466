"""The files of a model for OpenVINO: as they are, or built from safetensors or a .gguf file, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from penstock.core.errors import ModelLoadError
from penstock.engines.adapters import refuse_as_model
from penstock.engines.child.notices import notify
from penstock.engines.frames import Progress
from penstock.engines.models import check_tokenizer, download, is_remote, local_place
from penstock.engines.openvino.precision import PRECISIONS, SHARES, SMALL, automatic
from penstock.engines.text.model import read_json
from penstock.models.cache import cache_folder
from penstock.models.catalogue import CATALOGUE

IR_NAMES = ("openvino_model.xml", "openvino_language_model.xml")


@dataclass(frozen=True)
class ModelFiles:
    """``ir``: the network's .xml; ``text``: the folder with tokenizer.json and the configs; ``precision``: the name of
    the one to compute with. ``exported``: somebody else made the network."""

    ir: Path
    text: Path
    precision: str
    exported: bool = False


def resolve(
    name: str, path: str | None, progress: Progress, precision: str = "auto", cache: Path | None = None
) -> ModelFiles:
    """The files of a model: a bundled name, a folder (OpenVINO or safetensors), a .gguf file, or a hub name; its
    weights stored as *precision* wants them.

    Raises `ModelLoadError` that says what to do.
    """
    cache = cache or cache_folder()
    place = find(name, path) or _checked(download(path or name, progress))
    for ir in IR_NAMES:
        if (place / ir).is_file():
            return _exported(place / ir, precision)
    from penstock.engines.openvino.ir import built, is_packed  # imports OpenVINO: not in the server

    if precision == "auto":
        precision = automatic(weights_size(place), psutil.virtual_memory().total, lambda: is_packed(place))
        notify("engine.precision", precision=precision)
    target = built(place, cache / "ir", progress, PRECISIONS[precision].weights)
    return ModelFiles(target / "openvino_model.xml", target, precision)


def _exported(ir: Path, precision: str) -> ModelFiles:
    """A network that somebody else has built: its weights stay as they are."""
    if precision == "auto":
        precision = "f32" if ir.with_suffix(".bin").stat().st_size <= SMALL else "fast"
        notify("engine.precision", precision=precision)
    if PRECISIONS[precision].weights != "as they are":
        raise ModelLoadError(
            f"{ir.parent} is an exported model, whose weights cannot be made smaller here: export it with "
            f"--weight-format {PRECISIONS[precision].weights} and serve it as f32 or fast, or serve its safetensors."
        )
    return ModelFiles(ir, ir.parent, precision, exported=True)


def kept_share(name: str, path: str | None, precision: str) -> float:
    """Bytes of the weights in memory for each in their files of 16-bit numbers, at least."""
    place = local_place(name, path)
    if precision == "auto":
        if not place.is_dir() or read_json(place / "config.json").get("quantization_config"):
            return 1.0
        if any((place / ir).is_file() for ir in IR_NAMES):
            return 1.0
        precision = automatic(weights_size(place), psutil.virtual_memory().total, lambda: False)
    return SHARES[PRECISIONS[precision].weights]


def weights_size(place: Path) -> int:
    """Bytes of the weights in a folder with safetensors, or of a .gguf file."""
    return sum(path.stat().st_size for path in (place.glob("*.safetensors") if place.is_dir() else [place]))


def find(name: str, path: str | None) -> Path | None:
    """Where such a model is: a folder or a .gguf file; None where it has to be downloaded.

    Raises `ModelLoadError` that says what to do.
    """
    if is_remote(name, path):
        return None
    place = local_place(name, path)
    if not place.exists() and place.suffix == ".gguf":
        raise ModelLoadError(f"There is no file {place}.")
    if not place.exists():
        raise ModelLoadError(
            f"There is no model {path or name!r}. Give a folder with an OpenVINO or safetensors model, a .gguf file, a "
            f"name on the hub (organisation/name), or {' or '.join(CATALOGUE)}: --model NAME=PATH."
        )
    return _checked(place)


def _checked(folder: Path) -> Path:
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
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
