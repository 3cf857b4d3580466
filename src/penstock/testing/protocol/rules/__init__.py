"""The rules, one file a section of docs/protocol.md. Importing them registers them, in the specification's order."""

from __future__ import annotations

# isort: off
from penstock.testing.protocol.rules import (
    logs,
    submitting,
    framing,
    resuming,
    users,
    openai,
    responses,
    disconnecting,
    api,
)

# isort: on

__all__ = ["api", "disconnecting", "framing", "logs", "openai", "responses", "resuming", "submitting", "users"]
