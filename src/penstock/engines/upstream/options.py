"""``--option`` values and ``--model NAME=URL[,URL…]`` of the upstream engine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from penstock.core.errors import ModelLoadError
from penstock.core.job import Task
from penstock.engines.options import Count, Positive

TASKS: tuple[Task, ...] = ("generate", "embed", "tokenize", "score")
#: Inputs that one call may bring, at OpenAI.
MAX_BATCH = 2048

Seconds = Annotated[float, Meta(gt=0)]


class UpstreamOptions(msgspec.Struct, frozen=True):
    """``model``: what the servers call it (default: the model's name here). ``key_env``: name of the environment
    variable that holds the API key; ``key``: the key itself. ``slots``: streams at once, over all replicas.
    ``context``: in tokens, where the servers do not tell. ``connect_timeout``: seconds. ``idle_timeout``: seconds of
    silence after which a replica is taken for dead. ``retries``: rounds over all replicas, without a token, before a
    job goes back to the queue. ``dialect``: auto, openai, vllm, llama or penstock. ``continuation`` of an interrupted
    reply: auto, ids, text or none. ``tasks`` that the model can do: auto, or some of generate, embed, tokenize and
    score, by commas. ``batch``: inputs to embed in one call.
    """

    model: str = ""
    key_env: str = ""
    key: str = ""
    slots: Positive = 256
    context: Count = 0
    connect_timeout: Seconds = 5.0
    idle_timeout: Seconds = 60.0
    retries: Count = 4
    dialect: Literal["auto", "openai", "vllm", "llama", "penstock"] = "auto"
    continuation: Literal["auto", "ids", "text", "none"] = "auto"
    tasks: str = "auto"
    batch: Annotated[int, Meta(ge=1, le=MAX_BATCH)] = 32

    def __post_init__(self) -> None:
        if self.tasks != "auto" and not set(self.tasks.split(",")) <= set(TASKS):
            raise ModelLoadError(f"Option tasks is auto, or some of {', '.join(TASKS)}; not {self.tasks!r}.")

    @property
    def stated_tasks(self) -> tuple[Task, ...]:
        """What the operator says; empty: that the server be asked."""
        said = self.tasks.split(",")
        return tuple(task for task in TASKS if task in said)

    @property
    def secret(self) -> str:
        """The API key, or "". Raises `ModelLoadError` where the variable that should hold it is not set."""
        if not self.key_env:
            return self.key
        if self.key:
            raise ModelLoadError("Options key and key_env exclude each other.")
        if not (value := os.environ.get(self.key_env, "")):
            raise ModelLoadError(
                f"The environment variable {self.key_env} (option key_env) is not set. (Variables that begin with "
                "PENSTOCK_ are the server's own and don't reach its engines.)"
            )
        return value


@dataclass(frozen=True)
class ServerAddress:
    """Where a server is: ``root`` without and ``api`` with the version, neither with a slash at the end."""

    root: str
    api: str

    def __str__(self) -> str:
        return self.root

    @property
    def host(self) -> str:
        """With its port."""
        return urlsplit(self.root).netloc


def addresses(path: str | None) -> list[ServerAddress]:
    """The replicas of ``URL[,URL…]``. Raises `ModelLoadError`."""
    if not path:
        raise ModelLoadError("The upstream engine needs the server's address: --model NAME=http://host:port")
    found = []
    for url in filter(None, (part.strip() for part in path.split(","))):
        parts = urlsplit(url)
        try:
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if parts.username is not None or parts.password is not None:
            raise ModelLoadError("An upstream URL must not hold a user or a password: use the option key_env.")
        if not usable or parts.query or parts.fragment:
            raise ModelLoadError(f"{url!r} is not the address of a server: it has the form http://host:port[/v1].")
        base = url.rstrip("/")
        versioned = re.search(r"/v\d", parts.path) is not None
        found.append(ServerAddress(base.removesuffix("/v1"), base if versioned else f"{base}/v1"))
    if not found:
        raise ModelLoadError("The upstream engine needs the server's address: --model NAME=http://host:port")
    return found
