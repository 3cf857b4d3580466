"""What tests run besides Penstock and has to be installed: a laptop without it skips them, CI fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODE_PROJECT = ROOT / "examples" / "openai-node"


def command(name: str, package: str | None = None) -> str:
    """Where the command *name* (of Debian's *package*) is."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    return found or _missing(f"{name} is not installed (on Debian: apt install {package or name})")


def node() -> str:
    """Where node is; the SDK is in `NODE_PROJECT`, which has to be the working directory."""
    found = command("node", "nodejs")
    if not (NODE_PROJECT / "node_modules" / "openai").is_dir():
        _missing("openai-node is not installed (make sdks)")
    return found


def frameworks() -> str:
    """The Python that has LangChain and LlamaIndex."""
    python = ROOT / ".venv-examples" / "bin" / "python"
    return str(python) if python.exists() else _missing("LangChain and LlamaIndex are not installed (make sdks)")


def _missing(message: str) -> str:
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
