"""The transitions as Lua scripts, one file each in ``lua/``: each is atomic, and harmless when it is run twice."""

from __future__ import annotations

import hashlib
from importlib import resources

#: Every script is allowed to run when Redis is full, but the one that adds a job: what runs must be able to end.
_FLAGS = {"submit": "#!lua\n"}
_ALWAYS = "#!lua flags=allow-oom\n"

NAMES = (
    "enter", "submit", "claim", "append", "release", "cancel", "forget", "get", "read", "follow", "list", "stats",
    "ring", "sweep",
)  # fmt: skip


def _load(name: str) -> bytes:
    folder = resources.files(__package__) / "lua"
    text = _FLAGS.get(name, _ALWAYS) + (folder / "lib.lua").read_text() + (folder / f"{name}.lua").read_text()
    return text.encode()


SOURCES: dict[str, bytes] = {name: _load(name) for name in NAMES}
SHA: dict[str, str] = {name: hashlib.sha1(source).hexdigest() for name, source in SOURCES.items()}
