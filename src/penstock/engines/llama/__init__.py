"""The llama.cpp engine: quantised GGUF files."""

from __future__ import annotations

from penstock.engines.llama.options import LlamaOptions
from penstock.engines.models import find_gguf
from penstock.engines.plugin import Plugin

PLUGIN = Plugin(
    load="penstock.engines.llama.engine:load",
    options=LlamaOptions,
    check=lambda name, path, options: find_gguf(name, path),
    install="pip install 'penstock[llama]'",
)
