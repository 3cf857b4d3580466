"""Where pulled models are: a folder each, under ``models`` in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

from penstock.models.catalogue import Entry, Here


def cache_folder() -> Path:
    """Where pulled and converted models are kept. ``PENSTOCK_CACHE`` moves it."""
    given = os.environ.get("PENSTOCK_CACHE")
    return Path(given) if given else user_cache_path("penstock")


def folder_of(entry: Entry) -> Path:
    """Where the files of *entry* are once they are here. A folder that exists is complete."""
    return next(
        (source.folder for source in entry.sources if isinstance(source, Here)), cache_folder() / "models" / entry.name
    )


def pulled(entry: Entry) -> Path | None:
    """What an engine is given: the folder, or the .gguf file that is in it; None where it has to be pulled first."""
    folder = folder_of(entry)
    return next(iter(sorted(folder.glob("*.gguf"))), folder) if folder.is_dir() else None
