"""Whether the transformers engine can be tested here."""

from __future__ import annotations

import importlib.util
import os

TORCH = None if importlib.util.find_spec("transformers") is None else importlib.util.find_spec("torch")
NO_TORCH = "torch and transformers are not installed (make engines)"

if TORCH is None and os.environ.get("CI"):
    raise RuntimeError(f"CI tests every engine, but {NO_TORCH}")
