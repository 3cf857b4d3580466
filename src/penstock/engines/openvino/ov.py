"""OpenVINO, imported without its telemetry: importing the package would otherwise report the import to its makers."""

from __future__ import annotations

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: "there is no such module"

import openvino as ov  # noqa: E402
from openvino._offline_transformations import paged_attention_transformation  # noqa: E402

__all__ = ["ov", "paged_attention_transformation"]
