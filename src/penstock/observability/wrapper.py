"""What stands around a port and says only what it says otherwise."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

Port = TypeVar("Port")


class Wrapper(Generic[Port]):
    """Passes on to *wrapped* whatever a subclass has not of its own: together they are the port, for a `cast`."""

    def __init__(self, wrapped: Port) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)
