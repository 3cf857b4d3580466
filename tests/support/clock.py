"""Wall clocks of real processes that can be stepped while they run; monotonic clocks stay as they are.

Our own preloaded library (``clock_step.c``) and not libfaketime: that one keeps a Redis built with jemalloc from
starting, and makes ``time.sleep`` of the engine process fail.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("clock_step.c")


def can_step() -> bool:
    """Is there a C compiler?"""
    return _compiler() is not None


class SteppedClock:
    """The wall clock of every process that is started with `environment`. Its files are in *folder*."""

    def __init__(self, folder: Path, name: str) -> None:
        library = folder / "clock_step.so"
        if not library.exists():
            _compile(library)
        path = folder / f"{name}.clock"
        path.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_STEP_FILE": str(path)}
        with path.open("r+b") as file:
            self._step = mmap.mmap(file.fileno(), 8)

    @property
    def offset(self) -> int:
        return int(struct.unpack("=q", self._step[:8])[0])

    def step(self, seconds: int) -> None:
        """From now on the clock shows the true time plus *seconds*."""
        self._step[:8] = struct.pack("=q", seconds)

    def close(self) -> None:
        self._step.close()


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _compile(library: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        message = "stepping a clock takes a C compiler (on Debian: apt install gcc libc6-dev)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-Wall", "-o", library, SOURCE], check=True)
