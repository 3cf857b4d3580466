"""What the operator typed in ``--model NAME[=PATH]``, turned into files. Never sees anything from a client."""

from __future__ import annotations

import re
from pathlib import Path

from penstock.core.errors import ModelLoadError
from penstock.engines.adapters import refuse_as_model
from penstock.engines.frames import Progress
from penstock.models.cache import folder_of, pulled
from penstock.models.catalogue import CATALOGUE
from penstock.models.errors import PullError
from penstock.models.pull import pull, snapshot

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def weights_folder(name: str, path: str | None, progress: Progress) -> Path:
    """The folder of a Hugging Face model (``config.json`` and safetensors): a short name, a folder, or a hub name.

    Raises `ModelLoadError` that says what to do.
    """
    return find_weights(name, path) or _checked_weights(download(path or name, progress))


def find_weights(name: str, path: str | None) -> Path | None:
    """Where such a folder is; None where it has to be downloaded. Raises `ModelLoadError` that says what to do."""
    if is_remote(name, path):
        return None
    place = local_place(name, path)
    if not place.exists():
        raise ModelLoadError(
            f"There is no model folder {path or name!r}. Give a folder with config.json and *.safetensors, a name on "
            "the hub (organisation/name): --model NAME=PATH, or a name of `penstock models --available`."
        )
    return _checked_weights(place)


def _checked_weights(place: Path) -> Path:
    if place.suffix == ".gguf":
        raise ModelLoadError(f"{place} is a GGUF file: serve it with the engine openvino or llama.")
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
    """Where the model is or would be on this machine: where the operator says, in the package, or where it is pulled
    to. A folder or a file."""
    place = Path(path or name).expanduser()
    entry = CATALOGUE.get(path or name)
    if entry is None or (path is not None and place.exists()):
        return place
    return pulled(entry) or folder_of(entry)


def is_remote(name: str, path: str | None) -> bool:
    """Is it a name that files can be downloaded by, and has to be, since none are here?"""
    wanted, place = path or name, local_place(name, path)
    if wanted in CATALOGUE:
        return not place.exists()
    return not place.exists() and place.suffix != ".gguf" and HUB_NAME.fullmatch(wanted) is not None


def gguf_file(name: str, path: str | None, progress: Progress) -> Path:
    """A GGUF file of any kind. Raises `ModelLoadError` that says what to do."""
    return find_gguf(name, path) or _checked_gguf(download(path or name, progress))


def find_gguf(name: str, path: str | None) -> Path | None:
    """Where it is; None where it has to be downloaded. Raises `ModelLoadError` that says what to do."""
    known = (path or name) in CATALOGUE
    if path is None and not known:
        raise ModelLoadError(f"Say where the GGUF file of {name!r} is: --model {name}=FILE.gguf")
    if known and is_remote(name, path):
        return None
    return _checked_gguf(local_place(name, path))


def _checked_gguf(file: Path) -> Path:
    if not file.is_file():
        raise ModelLoadError(f"{file} is a folder, not a GGUF file." if file.is_dir() else f"There is no file {file}.")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelLoadError(f"{file} is not a GGUF file.")
    return file


def download(name: str, progress: Progress) -> Path:
    """The files of a model of the catalogue, or the folder of a hub repository. Raises `ModelLoadError`."""
    if name in CATALOGUE:
        return pull(CATALOGUE[name], progress)
    progress(f"downloading {name}", None)
    try:
        return snapshot(name, lambda fraction: progress(f"downloading {name}", fraction))
    except PullError as error:
        raise ModelLoadError(
            f"Cannot download {name!r} from the hub: {error.message}. Without a network, download it elsewhere with "
            f"'hf download {name} --local-dir FOLDER', copy the folder here and give --model NAME=FOLDER."
        ) from error
