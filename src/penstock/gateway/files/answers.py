"""What is told of files."""

from __future__ import annotations

from typing import Literal

from penstock.api.base import WireType


class FileView(WireType, frozen=True):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FileList(WireType, frozen=True):
    object: Literal["list"]
    data: list[FileView]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(WireType, frozen=True):
    id: str
    object: Literal["file"]
    deleted: bool
