"""What the operator typed in ``--model NAME[=PATH]``, turned into files. Never sees anything from a client."""

from __future__ import annotations

import re
from pathlib import Path

from penstock.core.errors import ModelLoadError
from penstock.engines.adapters import refuse_as_model
from penstock.engines.frames import Progress

#: Models that come with the package: name → folder under ``penstock/bundled``.
BUNDLED = Path(__file__).resolve().parent.parent / "bundled"

#: What is downloaded of a hub repository: weights and text files, never code and never pickles.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "openvino_*.xml", "openvino_*.bin")

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def weights_folder(name: str, path: str | None, progress: Progress) -> Path:
    """The folder of a Hugging Face model (``config.json`` and safetensors): a bundled name, a folder, or a hub name.

    Raises `ModelLoadError` that says what to do.
    """
    return find_weights(name, path) or _checked_weights(download(path or name, progress))


def find_weights(name: str, path: str | None) -> Path | None:
    """Where such a folder is; None where it has to be downloaded. Raises `ModelLoadError` that says what to do."""
    wanted = path or name
    place = local_place(name, path)
    if not place.is_dir() and HUB_NAME.fullmatch(wanted) and not place.exists():
        return None
    if not place.is_dir():
        raise ModelLoadError(
            f"There is no model folder {wanted!r}. Give a folder with config.json and *.safetensors, or a name on the "
            "hub (organisation/name): --model NAME=PATH."
        )
    return _checked_weights(place)


def _checked_weights(place: Path) -> Path:
    refuse_as_model(place)
    if not (place / "config.json").is_file() or not any(place.glob("*.safetensors")):
        raise ModelLoadError(
            f"{place} needs config.json and *.safetensors. Other weight files (pickles: .bin, .pt) are not loaded, "
            "since they can run code: convert them to safetensors."
        )
    return place


def check_tokenizer(folder: Path) -> None:
    """Raise `ModelLoadError` for a folder without the file that text is cut into tokens by."""
    if not (folder / "tokenizer.json").is_file():
        raise ModelLoadError(
            f"{folder} has no tokenizer.json. Put the model's tokenizer.json (and tokenizer_config.json) there; the "
            "model's page on the hub has them."
        )


def local_place(name: str, path: str | None) -> Path:
    """Where the model would be on this machine: where the operator says, or in the package."""
    if path is None and (BUNDLED / name / "config.json").is_file():
        return BUNDLED / name
    return Path(path or name).expanduser()


def find_gguf(name: str, path: str | None) -> Path:
    """A GGUF file of any kind. Raises `ModelLoadError` that says what to do."""
    if path is None:
        raise ModelLoadError(f"Say where the GGUF file of {name!r} is: --model {name}=FILE.gguf")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ModelLoadError(f"There is no file {file}.")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelLoadError(f"{file} is not a GGUF file.")
    return file


def download(name: str, progress: Progress) -> Path:
    """The folder of a hub repository, weights and text files only. Raises `ModelLoadError`."""
    from huggingface_hub import snapshot_download  # slow to import: only where it is needed

    progress(f"downloading {name}", None)
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # its own errors, httpx's, OSError: whatever the reason, the remedy is the same
        raise ModelLoadError(
            f"Cannot download {name!r} from the hub: {error}. Without a network, download it elsewhere with "
            f"'hf download {name} --local-dir FOLDER', copy the folder here and give --model NAME=FOLDER."
        ) from error
