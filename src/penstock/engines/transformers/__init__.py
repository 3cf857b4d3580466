"""The transformers engine: any causal language model of the library, on a CPU or a CUDA device."""

from __future__ import annotations

from penstock.engines.models import find_weights
from penstock.engines.plugin import Plugin
from penstock.engines.transformers.options import TransformersOptions

PLUGIN = Plugin(
    load="penstock.engines.transformers.engine:load",
    options=TransformersOptions,
    check=lambda name, path, options: find_weights(name, path),
    install="pip install 'penstock[transformers]'",
)
