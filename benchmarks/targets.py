"""Targets: what is measured, described in `scenarios/targets.toml`, and how it is started and stopped.

A target is either a *server* (started, waited for, loaded over HTTP, stopped) or a *command* (runs the load by itself
and prints one JSON object a cell, as `engine_direct` does). Both kinds are a few lines of TOML with `{placeholders}`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load import Server
from benchmarks.processes import RedisServer, TargetError, free_port

HERE = Path(__file__).parent
CATALOGUE = HERE / "scenarios" / "targets.toml"


@dataclass(frozen=True)
class Target:
    """One entry of the catalogue, its placeholders not yet filled in."""

    name: str
    command: list[str]
    kind: str = "server"
    about: str = ""
    ready: str = "/health"
    """Path that answers 200 once the server can be used."""
    ready_timeout: float = 120.0
    model: str = "default"
    body: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request; null is written as the string "null" and removes a field."""
    headers: dict[str, str] = field(default_factory=dict)
    """Further headers of each request."""
    env: dict[str, str] = field(default_factory=dict)
    warmup: int = 8
    redis: str = ""
    """Durability of a redis-server that is started with it, `strict` or `fast`; {redis} is its URL."""
    beside: list[list[str]] = field(default_factory=list)
    """Commands of further processes of the same server, started before it: its workers, its upstream."""
    peer: str = ""
    """Which environment of peers.sh it runs in."""
    keep: bool = False
    """Its start takes so long that it stays up, idle, between its turns."""

    def missing(self, variables: dict[str, str]) -> str:
        """Why it cannot run here and what to do, or an empty string."""
        command = fill(self.command, variables)
        if not shutil.which(command[0]):
            how = f" (`make peers PEERS={self.peer}` sets it up)" if self.peer else ""
            return f"{self.name}: no {command[0]}{how}"
        models = fill("{models}/", variables)
        for path in (word[word.find(models) :] for word in command if models in word):
            if not Path(path).exists():
                return f"{self.name}: no {path} (`make models` makes them)"
        return ""


def load_targets(path: Path = CATALOGUE) -> dict[str, Target]:
    """The catalogue by name."""
    return {name: Target(name=name, **entry) for name, entry in tomllib.loads(path.read_text()).items()}


def default_variables() -> dict[str, str]:
    """Values for the placeholders that need no `--set`; a value may contain placeholders that come later."""
    beside = Path(sys.executable).parent / "penstock"
    return {
        "python": sys.executable,
        "penstock": str(beside) if beside.exists() else "penstock",
        "transformers": "{peers}/torch/bin/transformers",
        "torch_penstock": "{peers}/torch/bin/penstock",
        "torch_python": "{peers}/torch/bin/python",
        "vllm_python": "{peers}/vllm/bin/python",
        "vllm_penstock": "{peers}/vllm/bin/penstock",
        "llama_server": "{peers}/llama.cpp/bin/llama-server",
        "litellm": "{peers}/litellm/bin/litellm",
        "peers": str(HERE.parent / ".venv-peers"),  # below those that it is part of
        "scenarios": str(HERE / "scenarios"),
        "cores": str(os.cpu_count() or 1),
        "vllm_cpus": f"0-{(os.cpu_count() or 1) - 1}",
        "models": str(HERE / "models"),
        "shape": "S",
        "rate": "200",
        "weights": "{}",
    }


def fill(value: Any, variables: dict[str, str]) -> Any:
    """Fill `{placeholders}` in strings, through lists and tables. JSON braces in a value need no escaping."""
    if isinstance(value, str):
        if value == "null":
            return None
        for name, text in variables.items():
            value = value.replace("{" + name + "}", text)
        return value
    if isinstance(value, list):
        return [fill(item, variables) for item in value]
    if isinstance(value, dict):
        return {key: fill(item, variables) for key, item in value.items()}
    return value


class Running:
    """A started server target. A context manager: leaves no process behind, ends only what it started."""

    def __init__(self, target: Target, variables: dict[str, str]) -> None:
        self.target = target
        self._scratch = tempfile.mkdtemp(prefix="penstock-bench-")
        self._log = Path(self._scratch) / "log"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.redis: RedisServer | None = None
        self.port = free_port()
        self._variables = variables | {
            "port": str(self.port),
            "upstream_port": str(free_port()),
            "data_dir": f"{self._scratch}/data",
        }
        try:
            if target.redis:
                self.redis = RedisServer(target.redis)
                self._variables["redis"] = self.redis.url
            for command in (*target.beside, target.command):
                self._start(fill(command, self._variables))
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _start(self, command: list[str]) -> None:
        with self._log.open("ab") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # its own process group, so that stopping it stops its children
                    env=os.environ | fill(self.target.env, self._variables),
                )
            except OSError as error:
                raise TargetError(f"{self.target.name}: cannot start {command[0]}: {error.strerror}") from None
        self._processes.append(process)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def server(self) -> Server:
        """Where and how to send the load."""
        return Server(
            url=f"http://127.0.0.1:{self.port}",
            model=fill(self.target.model, self._variables),
            body=fill(self.target.body, self._variables),
            headers=self.target.headers,
            pids=self.pids,
        )

    @property
    def pids(self) -> tuple[int, ...]:
        """Of its processes, the redis-server included."""
        return (*(process.pid for process in self._processes), *([self.redis.pid] if self.redis else []))

    def pause(self) -> None:
        """SIGSTOP the whole tree, so that it eats no CPU while another target is measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self, patience: float = 15.0) -> None:
        """SIGTERM to the process groups, SIGKILL to what is left of them after `patience` seconds."""
        children = [
            child
            for process in self._processes
            if process.poll() is None
            for child in psutil.Process(process.pid).children(recursive=True)
        ]
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        deadline = time.monotonic() + patience
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        _, alive = psutil.wait_procs(children, timeout=2)
        for child in alive:
            with contextlib.suppress(psutil.Error):
                child.kill()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        if self.redis is not None:
            self.redis.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def _wait_until_ready(self) -> None:
        url = f"http://127.0.0.1:{self.port}{self.target.ready}"
        deadline = time.monotonic() + self.target.ready_timeout
        while time.monotonic() < deadline:
            for process in self._processes:
                if process.poll() is not None:
                    raise TargetError(f"{self.target.name} exited with {process.returncode}:\n{self._tail()}")
            try:
                with urllib.request.urlopen(url, timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.1)
        raise TargetError(
            f"{self.target.name}: {url} was not ready in {self.target.ready_timeout:g} s:\n{self._tail()}"
        )

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-1500:]
