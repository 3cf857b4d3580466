"""llama.cpp's own HTTP server: ``python -m tests.support.llama_server GGUF PORT SLOTS EMBEDDING``."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tests.support.gguf import bundled_gguf
from tests.support.server import free_port, wait_for

#: Tokens of one sequence.
CONTEXT = 1024


class LlamaServer:
    """A context manager; ``url`` answers inside it.

    With the model in the box, or with *embedding*, a GGUF file that is served for its vectors alone.
    """

    def __init__(self, folder: Path, slots: int = 4, embedding: Path | None = None) -> None:
        self._folder = folder
        self._slots = slots
        self._embedding = embedding
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        weights = self._embedding or bundled_gguf(self._folder)
        told = [str(weights), str(self.port), str(self._slots), str(int(self._embedding is not None))]
        with (self._folder / "llama.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.llama_server", *told],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_for(self._answers, "llama.cpp's server", 60)
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"llama.cpp's server exited:\n{(self._folder / 'llama.log').read_text()[-3000:]}")
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200
        return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def serve(weights: str, port: int, slots: int, embedding: bool) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = weights
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.embedding = embedding
    params.n_parallel = slots
    params.n_ctx = CONTEXT * slots
    params.kv_unified = False
    params.n_threads_http = slots + 4
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
