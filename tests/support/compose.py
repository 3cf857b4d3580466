"""The shipped Compose file as Compose would read it, for tests that have no Docker."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<word>[^}]*))?\}")


def load(environment: Mapping[str, str]) -> Any:
    """docker-compose.yml with its variables replaced. Raises `KeyError` for one that has no value."""

    def value(found: re.Match[str]) -> str:
        given = environment.get(found["name"], "")
        if given or found["kind"] is None:
            return given or environment[found["name"]]
        if found["kind"] == "-":
            return str(found["word"])
        raise KeyError(f"{found['name']} {found['word']}")

    def replaced(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: replaced(each) for key, each in node.items()}
        if isinstance(node, list):
            return [replaced(each) for each in node]
        return _VARIABLE.sub(value, node) if isinstance(node, str) else node

    return replaced(yaml.safe_load((DEPLOY / "docker-compose.yml").read_text()))


def variables() -> set[str]:
    """The names that it takes from its environment."""
    return {found["name"] for found in _VARIABLE.finditer((DEPLOY / "docker-compose.yml").read_text())}


def redis_settings(compose: Any) -> dict[str, str]:
    """The flags of the Redis service's command."""
    name, *words = compose["services"]["redis"]["command"]
    assert name == "redis-server"
    assert len(words) % 2 == 0
    return {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
