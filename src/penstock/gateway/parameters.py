"""Parameters of path, query and headers, as OpenAPI has them."""

from __future__ import annotations

from typing import Any

Parameters = list[dict[str, Any]]

ID: Parameters = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
LAST_EVENT_ID: dict[str, Any] = {"name": "Last-Event-ID", "in": "header", "schema": {"type": "string"}}


def query(**names: str) -> Parameters:
    """Optional ones of the query, by their types."""
    return [{"name": name, "in": "query", "schema": {"type": kind}} for name, kind in names.items()]


def limit(most: int) -> dict[str, Any]:
    return {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": most}}


ORDER: dict[str, Any] = {"name": "order", "in": "query", "schema": {"type": "string", "enum": ["asc", "desc"]}}
RESUME: Parameters = [LAST_EVENT_ID, *query(after="string")]
#: Where the ids of events are positions.
RESUME_AT: Parameters = [
    {**LAST_EVENT_ID, "schema": {"type": "string", "pattern": "^[0-9]{1,15}$"}},
    {"name": "after", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 10**15 - 1}},
]
