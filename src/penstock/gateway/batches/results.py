"""The outputs of a batch that runs: one file of results for the lines that succeeded, one for the others.

What these files hold is done; a runner that comes later learns from them where to go on.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import msgspec

from penstock.gateway.batches.answers import LineResult
from penstock.gateway.batches.store import Batch
from penstock.gateway.files.disk import AppendOnlyFile
from penstock.gateway.sse import ascii_json

#: Results that are written together, at most.
MAX_WRITE = 1024


class Result(msgspec.Struct, frozen=True):
    """A line's result on its way to the disk. Its id is made of its job's (or the batch's) and the line's number."""

    text: bytes
    succeeded: bool
    has_slot: bool
    """Has the line a slot, to be released now?"""

    @classmethod
    def of(cls, line: LineResult, *, succeeded: bool, has_slot: bool) -> Result:
        return cls(ascii_json(line).encode() + b"\n", succeeded, has_slot)


def result_id(owner: str, number: int) -> str:
    """*owner*: the id of the line's job, or of the batch where it has none."""
    return f"batch_req_{owner.rpartition('_')[2]}{number:06x}"


class ResultLog:
    """Both files of *batch*, whose counts follow what is in them. Blocks."""

    def __init__(self, folder: Path, batch: Batch) -> None:
        self.done: set[int] = set()
        """Numbers of the lines that have a result."""
        self._folder = folder
        self._batch = batch
        self._files: dict[bool, AppendOnlyFile] = {}

    def open(self) -> list[str]:
        """Read what is there; the jobs that may not have been forgotten. Can be called again after an `OSError`."""
        batch = self._batch
        self.close()
        self.done.clear()
        batch.completed = batch.failed = batch.prompt_tokens = batch.completion_tokens = 0
        jobs: list[str] = []
        for succeeded, name in ((True, "output.jsonl"), (False, "errors.jsonl")):
            latest: deque[str] = deque(maxlen=MAX_WRITE)

            def learn(line: bytes, succeeded: bool = succeeded, latest: deque[str] = latest) -> None:
                latest.append(self._count(line, succeeded))

            self._files[succeeded] = AppendOnlyFile(self._folder / name, learn)
            jobs += latest
        return jobs

    def append(self, results: list[Result], succeeded: bool) -> list[str]:
        """Add those of *results* that did or did not succeed; their jobs. Durable when it returns; all or nothing."""
        lines = [result.text for result in results if result.succeeded is succeeded]
        self._files[succeeded].append(lines)
        return [self._count(line, succeeded) for line in lines]

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _count(self, line: bytes, succeeded: bool) -> str:
        """Take in a result; its job's id. Raises `ValueError` for a line that is not a result."""
        result = _logged.decode(line)
        batch, usage = self._batch, result.usage
        self.done.add(result.number)
        batch.completed += succeeded
        batch.failed += not succeeded
        batch.prompt_tokens += usage.prompt_tokens or usage.input_tokens
        batch.completion_tokens += usage.completion_tokens or usage.output_tokens
        return result.job


class _Usage(msgspec.Struct, frozen=True):
    """In the words of either dialect."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Reply(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


class _Response(msgspec.Struct, frozen=True):
    body: _Reply


class _LoggedResult(msgspec.Struct, frozen=True):
    """What a later runner has to know of a result."""

    id: str
    response: _Response | None = None

    @property
    def number(self) -> int:
        return int(self.id[42:], 16)

    @property
    def job(self) -> str:
        return "job_" + self.id[10:42]

    @property
    def usage(self) -> _Usage:
        return (self.response and self.response.body.usage) or _Usage()


_logged = msgspec.json.Decoder(_LoggedResult)
