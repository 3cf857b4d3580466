"""The llama.cpp engine: quantised GGUF files."""

from __future__ import annotations

from penstock.engines.adapters import check_files
from penstock.engines.llama.options import LlamaOptions
from penstock.engines.models import find_gguf
from penstock.engines.plugin import Plugin


def _check(name: str, path: str | None, options: LlamaOptions) -> None:
    find_gguf(name, path)
    check_files(options.adapters)


PLUGIN = Plugin(
    load="penstock.engines.llama.engine:load",
    options=LlamaOptions,
    check=_check,
    install="pip install 'penstock[llama]'",
)
