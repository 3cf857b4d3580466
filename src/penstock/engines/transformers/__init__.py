"""The transformers engine: any causal language model of the library, on a CPU or a CUDA device."""

from __future__ import annotations

from penstock.engines.adapters import check_folders
from penstock.engines.models import find_weights
from penstock.engines.plugin import Plugin
from penstock.engines.transformers.options import TransformersOptions


def _check(name: str, path: str | None, options: TransformersOptions) -> None:
    find_weights(name, path)
    check_folders(options.adapters)


PLUGIN = Plugin(
    load="penstock.engines.transformers.engine:load",
    options=TransformersOptions,
    check=_check,
    install="pip install 'penstock[transformers]'",
)
