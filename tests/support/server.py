"""A real server process on a port of its own: started, killed, stopped and restarted by its pid.

`fleet.py` has the processes that serve over Redis.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

#: Seconds anything may take on a loaded machine before a test gives up on it.
PATIENCE = 60.0


def model(name: str = "synthetic", *, engine: str = "synthetic", path: str | None = None, **options: object) -> Any:
    """One entry of the ``models`` setting."""
    return {
        "name": name,
        "engine": engine,
        "path": path,
        "options": {key: str(value) for key, value in options.items()},
    }


def free_port() -> int:
    """A port below the ephemeral range, so that nobody's outgoing connection takes it while a server restarts."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def wait_for(condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """Poll *condition* until it is true; its value."""
    until = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {timeout:.0f} s")
        time.sleep(0.02)


class Process:
    """A ``penstock`` *command* in *folder* (logs, working directory), with ``PENSTOCK_*`` *settings*.

    ``start`` waits until it is ready. The environment's own ``PENSTOCK_*`` variables don't reach it.
    """

    command = ""

    def __init__(self, folder: Path, *, settings: Mapping[str, object] | None = None, args: Sequence[str] = ()) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.settings: dict[str, object] = {"log_format": "json", **(settings or {})}
        self.args = list(args)
        self.extra_env: dict[str, str] = {}
        """Added to its environment, and to that of its engines."""
        self.log_path = folder / "server.log"
        self.error_path = folder / "server.err"
        self.process: subprocess.Popen[bytes] | None = None
        self._ours: dict[int, psutil.Process] = {}

    # ------------------------------------------------------------------------------------ what it is

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def output(self) -> str:
        """Its standard output of all its lives."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def errors(self) -> str:
        """Its standard error of all its lives."""
        return self.error_path.read_text() if self.error_path.exists() else ""

    def log_lines(self) -> list[dict[str, Any]]:
        """The JSON lines of its log (a line that a kill tore is left out)."""
        lines = []
        for line in self.output().splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    lines.append(value)
        return lines

    def engine_pids(self) -> list[int]:
        """Its live engine processes, the oldest first."""
        engines = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if child.status() != psutil.STATUS_ZOMBIE and "penstock.engines.child" in child.cmdline():
                        self._ours[child.pid] = child
                        engines.append((child.create_time(), child.pid))
        return [pid for _, pid in sorted(engines)]

    def engine_pid(self, timeout: float = PATIENCE) -> int:
        """The engine process (waits for one that is just being restarted)."""
        return int(wait_for(self.engine_pids, "an engine process", timeout)[0])

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE, trust_env=False, **kwargs)

    # ------------------------------------------------------------------------------------ life

    def arguments(self) -> list[str]:
        """The command line behind the command's name."""
        return ["--port", str(self.port), *self.args]

    def is_ready(self) -> bool:
        return self.get("/readyz").status_code == 200

    def environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        for name, value in self.settings.items():
            text = value if isinstance(value, str) else json.dumps(value)
            environment[f"PENSTOCK_{name.upper()}"] = text
        environment["PYTHONUNBUFFERED"] = "1"
        return {**environment, **self.extra_env}

    def spawn(self) -> None:
        """Start the process and wait for nothing."""
        assert self.process is None or self.process.poll() is not None, "it is running already"
        with self.log_path.open("ab") as out, self.error_path.open("ab") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock", self.command, *self.arguments()],
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        with contextlib.suppress(psutil.NoSuchProcess):
            self._ours[self.pid] = psutil.Process(self.pid)

    def start(self) -> Self:
        self.spawn()
        self.wait_ready()
        return self

    def wait_ready(self, timeout: float = PATIENCE) -> None:
        def ready() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"penstock {self.command} exited with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(httpx.TransportError):
                return self.is_ready()
            return False

        try:
            wait_for(ready, f"penstock {self.command} to be ready", timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.tail()}") from None
        self.engine_pids()

    def tail(self) -> str:
        return "\n".join((self.output() + self.errors()).splitlines()[-30:])

    def kill9(self) -> None:
        """As a power cut would: no goodbye. Waits until the process and its engines are gone."""
        engines = self.engine_pids()
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(PATIENCE)
        self._bury(engines)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def terminate(self, timeout: float = PATIENCE) -> int:
        """SIGTERM, and its exit code."""
        assert self.process is not None
        self.engine_pids()
        self.signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def restart(self) -> Self:
        """Start again on the same port and data."""
        return self.start()

    def stop(self) -> None:
        """Whatever its state: nothing of it is left afterwards."""
        if self.process is None:
            return
        engines = self.engine_pids()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        self._bury([*engines, *self._ours])

    def _bury(self, pids: Sequence[int]) -> None:
        """Engines die with their parent; one that is stopped or did not is ended by its pid."""
        processes = [self._ours[pid] for pid in dict.fromkeys(pids) if pid in self._ours]
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: all(map(_gone, processes)), "the end of the engines", 5)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_for(lambda: all(map(_gone, processes)), "the end of the engines")


class Server(Process):
    """``penstock serve``: everything in one process, its data in *data_dir*.

    *models* are entries of the ``models`` setting (see `model`); by default one synthetic model at *rate* tokens a
    second, or the *bundled* one.
    """

    command = "serve"

    def __init__(
        self,
        folder: Path,
        *,
        models: Sequence[Any] | None = None,
        rate: float = 50,
        options: Mapping[str, object] | None = None,
        settings: Mapping[str, object] | None = None,
        args: Sequence[str] = (),
        data_dir: Path | None = None,
        bundled: bool = False,
    ) -> None:
        super().__init__(folder, settings=settings, args=args)
        self.data_dir = data_dir or folder / "data"
        if bundled:
            models = [model("millrace", engine="openvino")]
        self.settings["models"] = models if models is not None else [model(rate=rate, **(options or {}))]

    def arguments(self) -> list[str]:
        return ["--data-dir", str(self.data_dir), *super().arguments()]

    def is_ready(self) -> bool:
        if not super().is_ready():
            return False
        models = self.get("/v1/models").json()["data"]
        return all(entry["state"] in ("ready", "unloaded") for entry in models)  # unloaded: on demand


def _gone(process: psutil.Process) -> bool:
    """Ended, even if whoever inherited it has not collected it yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True
