"""What cannot be built is refused, with a way out."""

from __future__ import annotations

from penstock.core.errors import ModelLoadError


def unbuildable(why: str) -> ModelLoadError:
    return ModelLoadError(
        f"This model cannot be converted here: {why}. Export it with optimum-intel "
        "(optimum-cli export openvino --model MODEL FOLDER), or take a ready-made one from the OpenVINO organisation "
        "on the hub, and serve that folder."
    )
