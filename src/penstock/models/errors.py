"""Why a model could not be pulled."""

from __future__ import annotations

from penstock.core.errors import ModelLoadError


class PullError(ModelLoadError):
    """From one source: another may do. From all: what to do."""


class NoRoom(PullError):
    """No source would help."""
