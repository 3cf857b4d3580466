"""CPU time and memory of processes and their children."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessUse:
    """What one process used between two readings."""

    name: str
    cpu_s: float
    peak_rss: int
    """Bytes; the peak of its whole life where the system tells (Linux), else the present value."""


def tree(pids: list[int]) -> dict[int, psutil.Process]:
    """The given processes and all their descendants."""
    found = {}
    for pid in pids:
        try:
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                found[process.pid] = process
        except psutil.NoSuchProcess:
            continue
    return found


def rss(pids: list[int]) -> int:
    """Resident bytes of the processes and their descendants, now."""
    return sum(_rss(process) for process in tree(pids).values())


class Meter:
    """Reads CPU time at its creation and at `read`; processes that end in between are not counted."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._before = {pid: _cpu(process) for pid, process in tree(pids).items()}
        self._own = time.process_time()
        self._busy = _busy()
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self._started

    def foreign(self, uses: list[ProcessUse]) -> float:
        """Cores kept busy by everything else on the machine meanwhile: above a few tenths, distrust the figures."""
        return max(0.0, (_busy() - self._busy - sum(use.cpu_s for use in uses)) / self.elapsed())

    def read(self) -> list[ProcessUse]:
        """Processes of the trees, busiest first, and the harness itself at the end."""
        own = time.process_time() - self._own
        uses = [
            ProcessUse(_name(process), _cpu(process) - self._before.get(pid, 0.0), _peak(process))
            for pid, process in tree(self._pids).items()
        ]
        uses.sort(key=lambda use: -use.cpu_s)
        return [*uses, ProcessUse("harness", own, _peak(psutil.Process()))]


def _cpu(process: psutil.Process) -> float:
    times = _quietly(process.cpu_times, None)
    return times.user + times.system if times else 0.0


def _busy() -> float:
    """CPU seconds that the whole machine has spent, time stolen by its host included."""
    spent = psutil.cpu_times()
    return float(sum(spent) - spent.idle - sum(getattr(spent, name, 0.0) for name in ("iowait", "guest", "guest_nice")))


def _peak(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _rss(process)


def _rss(process: psutil.Process) -> int:
    return _quietly(lambda: int(process.memory_info().rss), 0)


def _name(process: psutil.Process) -> str:
    """A short name for a process that says more than `python`."""
    line: list[str] = _quietly(process.cmdline, [])
    if "penstock.engines.child" in line:
        return "engine"
    line = line[:1] and [*line[0].split()[:1], *line[1:]]  # a server that writes its address into its title
    words = [Path(word).name for word in line[:1]] + [word for word in line[1:] if not word.startswith("/")]
    if len(line) > 1 and line[1].startswith("/"):
        words = [Path(line[1]).name, *words[1:]]
    words = [word for word in words if not word.startswith("-") and not word.isdigit() and len(word) < 40]
    return " ".join(words[:2]) or _quietly(process.name, "?")


def _quietly(call: Callable[[], T], default: T) -> T:
    """A reading of a process that may be gone by now."""
    try:
        return call()
    except psutil.Error:
        return default
