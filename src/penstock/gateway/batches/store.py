"""Batches: what is kept of each, and what makes a file the input of one.

::

    root/<tenant>/batches/batch_…/batch.json     `Batch`, replaced as a whole; only who runs it writes it
                                  cancel         that somebody asked to cancel it: when. Anybody writes it
                                  input.jsonl    the input, whatever becomes of the file it came from
                                  output.jsonl   results as they come, later the content of a file; so are
                                  errors.jsonl   the lines that failed
    root/<tenant>/runner                         whoever has the lock on it runs the tenant's batches

The lock is `flock`'s: the kernel lets go of it when its holder dies, however it dies. Functions here block; the event
loop calls them in threads. Times are seconds since the epoch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from penstock.core.errors import InvalidRequest, NotFound
from penstock.core.foreign import Malformed, Mismatch, decode
from penstock.core.job import ModelName
from penstock.gateway.files.store import FileStore, StoredFile, link, new_id, page, remove, storing, sync, write_whole

#: Seconds for which a batch may run: OpenAI's ``completion_window`` "24h".
WINDOW = 86400.0
MAX_LINES = 50_000
#: Errors of an input that are told.
MAX_ERRORS = 100
#: What a line may have beside its body, in bytes.
ENVELOPE = 4096

Outcome = Literal["completed", "expired", "cancelled"]
State = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelled"]
BatchStatus = Literal[State, "cancelling"]
ENDED = frozenset({"failed", "completed", "expired", "cancelled"})


class LineError(msgspec.Struct, frozen=True):
    """Why an input cannot be run. ``line`` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Batch(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is known of a batch. ``moments`` are the times at which it entered its states, by their names."""

    id: str
    endpoint: str
    input_file_id: str
    created_at: float
    expires_at: float
    metadata: dict[str, str] | None = None
    output_ttl: float | None = None
    state: State = "validating"
    moments: dict[str, float] = {}
    outcome: Outcome | None = None
    """What it becomes when its files are complete."""
    model: str | None = None
    errors: list[LineError] = []
    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    submitted: int = 0
    """Lines behind this one have no jobs yet."""
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def status(self) -> BatchStatus:
        """As OpenAI says it."""
        return "cancelling" if "cancelling" in self.moments and not self.ended else self.state

    def enter(self, state: State, now: float) -> None:
        self.state = state
        self.moments[state] = now


class BatchStore:
    """The batches of all tenants, beside their files."""

    def __init__(self, files: FileStore) -> None:
        self.files = files
        self.clock = files.clock

    def place(self, tenant: str, id: str) -> Path:
        return self.files.folder(tenant, "batches") / id

    def create(
        self,
        tenant: str,
        endpoint: str,
        source: StoredFile,
        *,
        metadata: dict[str, str] | None = None,
        output_ttl: float | None = None,
    ) -> Batch:
        """A new batch of the file *source*; durable, and there for every runner, when this returns."""
        now = self.clock.now()
        batch = Batch(
            id=new_id("batch_", now),
            endpoint=endpoint,
            input_file_id=source.id,
            created_at=now,
            expires_at=now + WINDOW,
            metadata=metadata,
            output_ttl=output_ttl,
        )
        with storing():
            folder = self.files.folder(tenant, "tmp") / batch.id
            folder.mkdir(mode=0o700)
            try:
                link(self.files.path(tenant, source.id), folder / "input.jsonl")
                write_whole(folder / "batch.json", msgspec.json.encode(batch))
                folder.rename(place := self.place(tenant, batch.id))
            except FileNotFoundError:  # deleted in this moment
                remove(folder)
                raise NotFound(f"There is no file {source.id!r}.", param="input_file_id") from None
            except BaseException:
                remove(folder)
                raise
            sync(place.parent)
        return batch

    def get(self, tenant: str, id: str) -> Batch:
        """Raises `NotFound`."""
        if re.fullmatch(r"batch_[0-9a-f]{32}", id):
            place = self.place(tenant, id)
            with contextlib.suppress(FileNotFoundError), storing():
                batch = msgspec.json.decode((place / "batch.json").read_bytes(), type=Batch)
                if not batch.ended and (at := self._cancelled_at(place)) is not None:
                    batch.moments["cancelling"] = at
                return batch
        raise NotFound(f"There is no batch {id[:64]!r}.", param="batch_id")

    def ids(self, tenant: str) -> list[str]:
        with storing():
            return os.listdir(self.files.folder(tenant, "batches"))

    def list(self, tenant: str, *, after: str | None = None, limit: int) -> tuple[list[Batch], bool]:
        """The newest first, beyond the id *after*; and whether there are more."""
        found: list[Batch] = []
        for id in page(iter(self.ids(tenant)), after, newest_first=True):
            with contextlib.suppress(NotFound):  # dropped a moment ago
                found.append(self.get(tenant, id))
            if len(found) > limit:
                break
        return found[:limit], len(found) > limit

    def save(self, tenant: str, batch: Batch) -> None:
        """Raises `OSError`."""
        write_whole(self.place(tenant, batch.id) / "batch.json", msgspec.json.encode(batch))

    def cancel(self, tenant: str, id: str) -> Batch:
        """Ask whoever runs it to stop. Raises `NotFound`, and `InvalidRequest` for one that has ended otherwise."""
        batch = self.get(tenant, id)
        if batch.ended and batch.state != "cancelled":
            raise InvalidRequest(f"A batch that is {batch.state} cannot be cancelled.", param="batch_id")
        if batch.status != "cancelling" and not batch.ended:
            now = self.clock.now()
            with storing():
                write_whole(self.place(tenant, id) / "cancel", msgspec.json.encode(now))
            batch.moments["cancelling"] = now
        return batch

    def _cancelled_at(self, place: Path) -> float | None:
        with contextlib.suppress(FileNotFoundError):
            return msgspec.json.decode((place / "cancel").read_bytes(), type=float)
        return None

    def lock(self, tenant: str) -> int | None:
        """The right to run the tenant's batches, as a descriptor to close; None while somebody else has it."""
        descriptor = os.open(
            self.files.folder(tenant, "batches").parent / "runner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        return descriptor

    def clean(self, tenant: str, batch: Batch) -> None:
        """Of a batch that has ended, only what is told of it has to be kept."""
        for name in ("input.jsonl", "output.jsonl", "errors.jsonl"):
            (self.place(tenant, batch.id) / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Drop batches that ended as long ago as files are kept. Harmless anywhere, any number of times."""
        for tenant in self.files.tenants():
            for id in self.ids(tenant):
                with contextlib.suppress(NotFound, FileNotFoundError):
                    batch = self.get(tenant, id)
                    if not batch.ended:
                        continue
                    self.clean(tenant, batch)  # whoever ran it may have died before
                    if batch.moments[batch.state] + self.files.ttl < self.clock.now():
                        grave = self.files.folder(tenant, "tmp") / f"{id}.gone"
                        self.place(tenant, id).rename(grave)
                        remove(grave)


# ---------------------------------------------------------------------------------------------- the input


class Line(msgspec.Struct, frozen=True):
    """One request of an input."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct, frozen=True):
    model: ModelName


class Checked(msgspec.Struct, frozen=True):
    """What an input has: how many lines, for which model (of which line), or why it cannot be run."""

    total: int = 0
    model: str | None = None
    line: int | None = None
    errors: list[LineError] = []


_MISSING = re.compile(r"missing required field `(\w+)`")
_AT = re.compile(r" - at `\$\.(\w+)")


def read_lines(path: Path, limit: int) -> Iterator[tuple[int, bytes]]:
    """(number, text) of every line that is not blank; of one that is longer than *limit* bytes, the beginning."""
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # some editors' mark at the beginning
            file.seek(0)
        number = 0
        while text := file.readline(limit + 1):
            number += 1
            rest = text if len(text) > limit else b""
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(1 << 20)
            if text and not text.isspace():
                yield number, text


def check_input(path: Path, endpoint: str, limit: int) -> Checked:
    """Read an input through and tell what is wrong with it. *limit*: bytes of a request's body."""
    errors: list[LineError] = []
    seen: set[str] = set()
    total, model, first = 0, None, None
    for number, text in read_lines(path, limit + ENVELOPE):
        total += 1
        if total > MAX_LINES:
            message = f"The file has more than {MAX_LINES} requests: make several batches of it."
            return Checked(errors=[LineError("too_many_tasks", message)])
        if len(errors) >= MAX_ERRORS:
            return Checked(errors=errors)
        if len(text) > limit + ENVELOPE:
            errors.append(LineError("request_too_large", f"The body may have {limit} bytes.", "body", number))
            continue
        line = _decode(text, number, errors)
        if line is None:
            continue
        if line.custom_id in seen:
            message = f"The custom_id {line.custom_id[:64]!r} is that of an earlier line, too."
            errors.append(LineError("duplicate_custom_id", message, "custom_id", number))
        seen.add(line.custom_id)
        if line.method != "POST":
            errors.append(LineError("invalid_method", "The method has to be POST.", "method", number))
        if line.url != endpoint:
            message = f"The url is not the batch's endpoint, {endpoint}."
            errors.append(LineError("url_mismatch", message, "url", number))
        wanted = _model_of(line, number, errors)
        if model is None:
            model, first = wanted, number
        elif wanted not in (None, model):
            message = f"The line is for another model than {model!r}: make a batch for each model."
            errors.append(LineError("model_mismatch", message, "body.model", number))
    if not total:
        errors.append(LineError("empty_file", "The file has no requests."))
    return Checked(errors=errors) if errors else Checked(total, model, first)


def decode_line(text: bytes) -> Line:
    """A line that has been checked."""
    return decode(text, Line)


def _decode(text: bytes, number: int, errors: list[LineError]) -> Line | None:
    try:
        return decode_line(text)
    except Mismatch as error:
        errors.append(_explain(str(error), number))
    except Malformed:
        errors.append(LineError("invalid_json_line", "The line is not valid JSON.", None, number))
    return None


def _model_of(line: Line, number: int, errors: list[LineError]) -> str | None:
    try:
        return decode(line.body, _Body).model
    except Mismatch as error:
        errors.append(_explain(str(error), number, "body"))
    except Malformed:
        errors.append(LineError("invalid_json_line", "The body is not valid JSON.", "body", number))
    return None


def _explain(message: str, number: int, where: str = "") -> LineError:
    """msgspec's words as OpenAI's: what is missing, or which field is not what it has to be."""
    prefix = f"{where}." if where else ""
    if (found := _MISSING.search(message)) is not None:
        param = prefix + found[1]
        return LineError("missing_required_parameter", f"Missing required parameter: {param}.", param, number)
    if (found := _AT.search(message)) is not None:
        param = prefix + found[1]
        return LineError("invalid_request", f"{param}: {message[: found.start()]}.", param, number)
    return LineError("invalid_request", f"{where or 'The line'} has to be a JSON object.", where or None, number)
