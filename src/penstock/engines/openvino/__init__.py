"""The OpenVINO engine: continuous batching on a CPU, and encoders that embed."""

from __future__ import annotations

from penstock.engines.openvino.files import find, kept_share
from penstock.engines.openvino.options import OpenVINOOptions
from penstock.engines.plugin import Plugin

PLUGIN = Plugin(
    load="penstock.engines.openvino.engine:load",
    options=OpenVINOOptions,
    check=lambda name, path, options: find(name, path),
    weights=lambda name, path, options: kept_share(name, path, options.precision),
)
