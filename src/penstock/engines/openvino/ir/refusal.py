"""What cannot be built is refused, with a way out."""

from __future__ import annotations

from penstock.core.errors import ModelLoadError


def unbuildable(why: str) -> ModelLoadError:
    return ModelLoadError(
        f"This model cannot be converted here: {why}. Serve it with --engine transformers (pip install "
        "'penstock[transformers]'), as a GGUF file with --engine llama, or export it with optimum-intel (optimum-cli "
        "export openvino --model MODEL FOLDER) and serve that folder."
    )
