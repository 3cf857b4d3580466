"""What an engine is to Penstock, and how it is found: by the entry point group ``penstock.engines``.

The engines in the box are entries as any other package's are. An entry is a `Plugin`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import msgspec

from penstock.core.errors import ModelLoadError

GROUP = "penstock.engines"


def _finds_nothing_wrong(name: str, path: str | None, options: Any) -> None:
    pass


def _as_in_the_files(name: str, path: str | None, options: Any) -> float:
    return 1.0


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """Known in the server's process too: the module that defines one must not import the engine's library."""

    load: str
    """Where its `penstock.engines.child.backend.Loader` is, as ``module:function``. Imported in the child only."""
    options: type[msgspec.Struct]
    """What ``--option`` can say: a struct whose fields all have defaults (see `penstock.engines.options.parse`)."""
    check: Callable[[str, str | None, Any], object] = _finds_nothing_wrong
    """(name, path, options): raises `ModelLoadError` for what loading would stumble over at once."""
    weights: Callable[[str, str | None, Any], float] = _as_in_the_files
    """(name, path, options): bytes that weights take in memory, at least, for each of their files'."""
    install: str = ""
    """How to get the libraries that it needs, e.g. ``pip install 'penstock[llama]'``."""


def engine_names() -> list[str]:
    """All engines that are installed."""
    return sorted(entry_points(group=GROUP).names)


def find_engine(name: str) -> Plugin:
    """Raises `ModelLoadError` where there is no such engine, or no use can be made of it."""
    entries = list(entry_points(group=GROUP, name=name))
    if not entries:
        names = engine_names()
        near = difflib.get_close_matches(name, names, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ModelLoadError(f"There is no engine {name!r}.{hint} Engines: {', '.join(names)}.")
    packages = [entry.dist.name if entry.dist else entry.value for entry in entries]
    if len(entries) > 1:
        raise ModelLoadError(
            f"Several packages bring an engine {name!r}: {', '.join(packages)}. Uninstall all but one."
        )
    try:
        plugin = entries[0].load()
    except Exception as error:  # somebody else's module: whatever it raises when it is imported
        raise ModelLoadError(f"The engine {name!r} of {packages[0]} cannot be imported: {error}") from error
    if not isinstance(plugin, Plugin):
        raise ModelLoadError(f"The engine {name!r} of {packages[0]} is no penstock.engines.plugin.Plugin.")
    return plugin
