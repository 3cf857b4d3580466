"""Real servers for tests, of Redis or Valkey: one, one with a replica, or a cluster of three.

On loopback, ended by their pids.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import redis
from benchmarks.processes import find_redis

from tests.support.server import free_port, wait_for

#: What the tier ``strict`` asks of a server.
STRICT: dict[str, str] = {"appendonly": "yes", "appendfsync": "always"}


def redis_binary() -> str:
    """Where redis-server is, or Valkey's; ``PENSTOCK_TEST_REDIS=redis`` (or ``valkey``) takes no other.

    Without either a laptop skips the test, and CI fails.
    """
    kind = os.environ.get("PENSTOCK_TEST_REDIS", "")
    assert kind in ("", "redis", "valkey"), f"PENSTOCK_TEST_REDIS={kind}: redis or valkey"
    found = find_redis(kind)
    if found is None:
        message = f"{kind or 'redis'}-server is not installed (on Debian: apt install redis-server; or: make setup)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


class RedisServer:
    """One redis-server in *folder* on a port of its own; *config* overrides its settings (see `STRICT`)."""

    def __init__(self, folder: Path, config: Mapping[str, str] | None = None, *, port: int | None = None) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self.config = {**STRICT, **(config or {})}
        self.extra_env: dict[str, str] = {}
        """Added to its environment."""
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def client(self) -> redis.Redis:
        """A plain client, for looking at it from outside."""
        return redis.Redis(port=self.port, password=self.config.get("requirepass"), socket_timeout=10)

    def start(self) -> None:
        """Start it (again: with what its append-only file holds) and wait until it answers."""
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "save": "",
            "loglevel": "notice",
            "logfile": str(self.folder / "redis.log"),
            "repl-diskless-sync-delay": "0",
            **self.config,
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen(
            [redis_binary(), *arguments], stdout=subprocess.DEVNULL, env={**os.environ, **self.extra_env}
        )
        wait_for(self.answers, f"redis-server on port {self.port}")

    def answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            log = self.folder / "redis.log"
            raise RuntimeError(f"redis-server exited: {log.read_text()[-2000:] if log.exists() else ''}")
        with contextlib.suppress(redis.RedisError), contextlib.closing(self.client()) as client:
            return bool(client.ping())
        return False

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill9(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def restart(self, after: float = 0.0) -> None:
        """kill -9, *after* seconds of nothing, and up again from the append-only file."""
        self.kill9()
        time.sleep(after)
        self.start()

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.kill9()
            self.process = None


class RedisCluster:
    """Three nodes that share the 16,384 slots."""

    def __init__(self, folder: Path, config: Mapping[str, str] | None = None) -> None:
        settings = {"cluster-enabled": "yes", "cluster-node-timeout": "2000", **(config or {})}
        self.nodes = [
            RedisServer(folder / str(number), {**settings, "cluster-port": str(free_port())}) for number in range(3)
        ]

    @property
    def url(self) -> str:
        return ",".join(node.url for node in self.nodes)

    def start(self) -> None:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        for node in self.nodes:
            node.start()
        first, *others = self.nodes
        for number, node in enumerate(self.nodes):
            begin, end = number * 16384 // 3, (number + 1) * 16384 // 3 - 1
            with contextlib.closing(node.client()) as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", begin, end)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        with contextlib.closing(first.client()) as client:
            for node in others:
                client.execute_command("CLUSTER MEET", "127.0.0.1", node.port, node.config["cluster-port"])
        wait_for(self.agrees, "the cluster")

    def agrees(self) -> bool:
        for node in self.nodes:
            with contextlib.closing(node.client()) as client:
                info = client.execute_command("CLUSTER INFO")
                if info["cluster_state"] != "ok" or info["cluster_known_nodes"] != "3":
                    return False
        return True

    def restart(self) -> None:
        """kill -9 of all nodes, and up again from what they have written."""
        for node in self.nodes:
            node.kill9()
        for node in self.nodes:
            node.start()
        wait_for(self.agrees, "the cluster")

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()
