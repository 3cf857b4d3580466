"""OpenAI's files, as far as batches need them: uploaded in parts straight to the disk, listed, read and deleted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, BinaryIO, Literal

import msgspec
from msgspec import UNSET, UnsetType
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.responses import FileResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.errors import (
    InvalidRequest,
    NotFound,
    PenstockError,
    RequestTooLarge,
    Unsupported,
    UnsupportedEncoding,
)
from penstock.gateway.dialects.answers import ends
from penstock.gateway.files.answers import FileDeleted, FileList, FileView
from penstock.gateway.files.disk import disk_errors, in_thread
from penstock.gateway.files.store import FileStore, StoredFile, Upload
from penstock.gateway.http import Call, Resource, json_reply, refuse
from penstock.gateway.operation import Content, Operation
from penstock.gateway.parameters import ID, ORDER, limit, query

#: Where this server keeps files.
FILES: Resource[FileStore] = Resource("This server keeps no files.")

PURPOSES = ("batch", "batch_output")
#: Bounds of ``expires_after[seconds]``: an hour, 30 days.
TTL = (3600, 30 * 86400)

#: What a form may have beside the file, in bytes.
FORM = 65_536
MAX_FIELD = 1024
MAX_PARTS = 64
#: Bytes that go to the disk at once.
BUFFER = 1 << 20
#: What is still read of an upload that was refused, so that its sender gets to hear why: bytes, seconds.
LINGER = (256 << 20, 30.0)


class FileUpload(msgspec.Struct, frozen=True):
    """The form of ``POST /v1/files``. ``expires_after[seconds]`` counts from the upload; it comes with its anchor."""

    file: Annotated[str, msgspec.Meta(extra_json_schema={"format": "binary"})]
    purpose: Literal["batch"]
    anchor: Literal["created_at"] | UnsetType = msgspec.field(name="expires_after[anchor]", default=UNSET)
    seconds: Annotated[int, msgspec.Meta(ge=TTL[0], le=TTL[1])] | UnsetType = msgspec.field(
        name="expires_after[seconds]", default=UNSET
    )


async def create(call: Call) -> ASGIApp:
    files = call.use(FILES)
    try:
        return json_reply(view(await _receive(call, files)))
    except PenstockError:
        await _linger(call)
        raise


async def list_files(call: Call) -> ASGIApp:
    files = call.use(FILES)
    after, limit = paging(call, default=10_000, most=10_000)
    order = call.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order is 'asc' or 'desc'.", param="order")
    found, more = await asyncio.to_thread(
        files.list,
        call.identity.tenant,
        purpose=call.query.get("purpose"),
        after=after,
        limit=limit,
        newest_first=order == "desc",
    )
    views = [view(file) for file in found]
    return json_reply(FileList("list", views, *ends(views), more))


async def show(call: Call) -> ASGIApp:
    return json_reply(view(await asyncio.to_thread(call.use(FILES).get, call.identity.tenant, call.path["id"])))


async def content(call: Call) -> ASGIApp:
    files = call.use(FILES)
    return await asyncio.to_thread(_open, files, call.identity.tenant, call.path["id"])


async def delete(call: Call) -> ASGIApp:
    await asyncio.to_thread(call.use(FILES).delete, call.identity.tenant, call.path["id"])
    return json_reply(FileDeleted(call.path["id"], "file", True))


# ---------------------------------------------------------------------------------------------- shared with batches


def paging(call: Call, *, default: int, most: int) -> tuple[str | None, int]:
    """(after, limit) of a list."""
    try:
        limit = int(call.query.get("limit", default))
    except ValueError:
        limit = 0
    if not 1 <= limit <= most:
        raise InvalidRequest(f"limit is between 1 and {most}.", param="limit")
    return call.query.get("after") or None, limit


def view(file: StoredFile) -> FileView:
    return FileView(
        id=file.id,
        object="file",
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=int(file.expires_at) if file.expires_at is not None else None,
        filename=file.filename,
        purpose=file.purpose,
        status="processed",
        status_details=None,
    )


# ---------------------------------------------------------------------------------------------- the download


class _Content(FileResponse):
    """What is in *file*, which is open and is closed with the answer: it may be deleted before that."""

    def __init__(self, file: BinaryIO, filename: str) -> None:
        number = file.fileno()
        super().__init__(
            f"/dev/fd/{number}", media_type="application/octet-stream", filename=filename, stat_result=os.fstat(number)
        )
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: Message | None = None

        async def unless_refused(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refused = message
            if refused is None:
                await send(message)

        with self._file:
            await super().__call__(scope, receive, unless_refused)
        # A Range that cannot be read, or begins behind the end: Starlette says so in plain text.
        if refused is not None:
            size = self.headers["content-length"]
            error = InvalidRequest(f"The header Range is 'bytes=FIRST-LAST' within the file's {size} bytes.")
            error.status = refused["status"]
            headers = {"content-range": f"bytes */{size}"} if error.status == 416 else None
            await refuse(error, scope, receive, send, headers)


def _open(files: FileStore, tenant: str, id: str) -> _Content:
    """Raises `NotFound`."""
    file = files.get(tenant, id)
    with disk_errors():
        try:
            return _Content(files.path(tenant, id).open("rb"), file.filename)
        except FileNotFoundError:  # deleted in this moment
            raise NotFound(f"There is no file {id!r}.", param="file_id") from None


# ---------------------------------------------------------------------------------------------- the upload


async def _receive(call: Call, files: FileStore) -> StoredFile:
    """The file of the form in the body; however it ends otherwise, nothing of it stays on the disk."""
    kind, options = parse_options_header(call.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest("Send a form (multipart/form-data) with the parts 'purpose' and 'file'.")
    if call.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedEncoding("A Content-Encoding is not accepted: send the form as it is.")
    length = call.headers.get("content-length", "")
    if length.isdigit() and int(length) > files.max_file + FORM:
        raise RequestTooLarge(f"The file is larger than {files.max_file} bytes.", param="file")
    with contextlib.ExitStack() as stack:
        upload = await in_thread(stack.enter_context, files.upload(call.identity.tenant))
        form = _Form(options[b"boundary"], upload)
        size = 0
        async for part in _body(call):
            size += len(part)
            if size > files.max_file + FORM:
                raise RequestTooLarge(f"The form is larger than a file of {files.max_file} bytes needs.", param="file")
            form.feed(part)
            if form.waiting >= BUFFER:
                await in_thread(form.flush)
        return await in_thread(form.finish)


class _Form:
    """Takes a form's bytes as they come: short fields into memory, the file to the disk."""

    def __init__(self, boundary: bytes, upload: Upload) -> None:
        self._upload = upload
        self._fields: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._pieces: list[bytes] = []
        self.waiting = 0
        """Bytes that are not yet with the disk."""
        self._beside = self._parts = 0
        self._header = self._value = b""
        self._name: str | None = None
        self._ended = False
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._begin,
            "on_header_begin": self._header_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._named,
            "on_part_data": self._data,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        except FormParserError as error:
            raise InvalidRequest(f"The form cannot be read: {error}") from error

    def feed(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequest(f"The form cannot be read: {error}") from error

    def flush(self) -> None:
        self._upload.write(b"".join(self._pieces))
        self._pieces.clear()
        self.waiting = 0

    def finish(self) -> StoredFile:
        if not self._ended:
            raise InvalidRequest("The form ends before its last boundary.")
        if self._filename is None:
            raise InvalidRequest("The form has no part 'file'.", param="file")
        self._check_purpose()
        ttl = expiry(self._text("expires_after[anchor]"), self._text("expires_after[seconds]"), "expires_after")
        self.flush()
        return self._upload.keep(self._filename, "batch", ttl)

    def _check_purpose(self) -> None:
        purpose = self._text("purpose")
        if purpose is None:
            raise InvalidRequest("The form has no part 'purpose'.", param="purpose")
        if purpose != "batch":
            raise Unsupported(f"The purpose {purpose[:64]!r} is not supported: 'batch' is.", param="purpose")

    def _text(self, name: str) -> str | None:
        value = self._fields.get(name)
        return None if value is None else value.decode("utf-8", "replace")

    # What the parser says; the file's data goes by without being looked at.

    def _begin(self) -> None:
        self._name = None
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise RequestTooLarge(f"The form has more than {MAX_PARTS} parts.")

    def _header_begin(self) -> None:
        self._header = self._value = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            if self._name == "file":
                if self._filename is not None:
                    raise InvalidRequest("The form has more than one file.", param="file")
                name = options.get(b"filename", b"upload").decode("utf-8", "replace")
                self._filename = name.replace("\\", "/").rpartition("/")[2][:255] or "upload"

    def _named(self) -> None:
        if self._name == "file":
            if "purpose" in self._fields:
                self._check_purpose()  # before 200 MB are sent in vain
        elif self._name:
            self._fields[self._name] = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._pieces.append(data[start:end])
            self.waiting += end - start
            return
        self._beside += end - start
        if self._name:
            self._fields[self._name] += data[start:end]
        if self._beside > FORM or len(self._fields.get(self._name or "", b"")) > MAX_FIELD:
            raise RequestTooLarge("The form has too much beside the file.", param=(self._name or "")[:64] or None)

    def _end(self) -> None:
        self._ended = True


def expiry(anchor: str | None, seconds: str | int | None, param: str) -> int | None:
    """How long something is kept, of an ``expires_after``; None where none is given."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest(f"{param}.anchor is 'created_at'.", param=f"{param}.anchor")
    try:
        value = int(seconds or 0)
    except ValueError:
        value = 0
    if not TTL[0] <= value <= TTL[1]:
        raise InvalidRequest(f"{param}.seconds is between {TTL[0]} and {TTL[1]}.", param=f"{param}.seconds")
    return value


async def _body(call: Call) -> AsyncIterator[bytes]:
    while True:
        message = await call.receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("The client left before the body was complete.")
        last = not message.get("more_body", False)
        call.scope["penstock.body_read"] = last  # before the yield: whoever refuses this part does not come back
        yield message.get("body", b"")
        if last:
            return


async def _linger(call: Call) -> None:
    """Read on for a while: a connection that is closed before the body was read takes the answer with it."""
    if call.scope.get("penstock.body_read"):
        return
    size, until = 0, time.monotonic() + LINGER[1]
    with contextlib.suppress(InvalidRequest, TimeoutError):
        async with asyncio.timeout(LINGER[1]):
            async for part in _body(call):
                size += len(part)
                if size > LINGER[0] or time.monotonic() > until:
                    return


OPERATIONS = [
    Operation(
        "POST",
        "/v1/files",
        create,
        "Upload the input of a batch",
        body=FileUpload,
        body_media="multipart/form-data",
        answers={200: FileView},
    ),
    Operation(
        "GET",
        "/v1/files",
        list_files,
        "List files",
        answers={200: FileList},
        parameters=[*query(purpose="string", after="string"), limit(10_000), ORDER],
    ),
    Operation("GET", "/v1/files/{id}", show, "What is known of a file", answers={200: FileView}, parameters=ID),
    Operation("DELETE", "/v1/files/{id}", delete, "Delete a file", answers={200: FileDeleted}, parameters=ID),
    Operation(
        "GET",
        "/v1/files/{id}/content",
        content,
        "A file's content",
        answers={
            200: Content(("application/octet-stream",)),
            206: Content(("application/octet-stream", "multipart/byteranges"), "What the header `Range` asked for"),
        },
        parameters=ID,
    ),
]
