"""What can be said of a model before anything is loaded: is there such an engine, are its options any, are the files
there.

In the server's process, so without any engine's library.
"""

from __future__ import annotations

from penstock.engines.host.process import EngineSpec
from penstock.engines.options import parse
from penstock.engines.plugin import find_engine


def check(spec: EngineSpec) -> None:
    """Raise `ModelLoadError` for what loading it would stumble over at once."""
    plugin = find_engine(spec.engine)
    plugin.check(spec.model, spec.path, parse(plugin.options, spec.options, spec.engine))
