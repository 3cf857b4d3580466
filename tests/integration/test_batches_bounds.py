"""What batches may cost: how large their files are, the gateway's memory, and nobody else's place in the queue."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.api import poll, submit
from tests.support.http import Answer, send
from tests.support.server import PATIENCE, Server, model

MIB = 1 << 20
MAX_FILE = 200 * MIB
MAX_LINES = 50_000
CHAT = "/v1/chat/completions"
BOUNDARY = "a-boundary-of-ours"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its limits are the default ones. ``crawl``: 2 tokens/s in each of four slots."""
    shared = Server(tmp_path_factory.mktemp("bounds"), models=[model("crawl", rate=2, slots=4)])
    try:
        yield shared.start()
    finally:
        shared.stop()


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


def lines(count: int, **body: Any) -> bytes:
    """An input of so many lines."""
    fields = {"model": "crawl", "messages": [{"role": "user", "content": "x"}], **body}
    whole = json.dumps({"custom_id": "NUMBER", "method": "POST", "url": CHAT, "body": fields}).encode() + b"\n"
    head, tail = whole.split(b"NUMBER")
    return b"".join(b"%b%d%b" % (head, number, tail) for number in range(count))


async def start(http: httpx.AsyncClient, data: bytes) -> str:
    """Upload an input and make a batch of it; its id."""
    file = await http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", data)})
    assert file.status_code == 200, file.text
    body = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
    batch = await http.post("/v1/batches", json=body)
    assert batch.status_code == 200, batch.text
    return str(batch.json()["id"])


async def no_longer(http: httpx.AsyncClient, batch: str, *states: str) -> Any:
    """The batch, once it is in none of these."""

    async def look() -> Any:
        return (await http.get(f"/v1/batches/{batch}")).json()

    return await poll(look, lambda seen: seen["status"] not in states)


def large(server: Server) -> list[Path]:
    """What uploads of these tests have on the disk, whole or in part."""
    return [path for path in (server.data_dir / "files").rglob("*") if path.stat().st_size > 64 * MIB]


class Uploading:
    """A form whose file is *size* bytes, made while it is sent. ``peak``: the server's memory meanwhile, in bytes."""

    def __init__(self, server: Server, size: int) -> None:
        self.server = server
        self.size = size
        self.process = psutil.Process(server.pid)
        self.peak = 0
        self.head = (
            f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="big.jsonl"\r\n\r\n'
        ).encode()
        self.tail = f"\r\n--{BOUNDARY}--\r\n".encode()

    def chunks(self) -> Iterator[bytes]:
        yield self.head
        block = b"x" * (MIB - 1) + b"\n"
        for at in range(0, self.size, MIB):
            yield block[: self.size - at]
            self.peak = max(self.peak, self.process.memory_info().rss)
        yield self.tail

    async def send(self) -> Answer:
        headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
        return await send(f"{self.server.url}/v1/files", "POST", headers=headers, chunks=self.chunks(), timeout=300)


class TestUploads:
    async def test_the_largest_goes_to_the_disk_as_it_comes(self, server: Server, http: httpx.AsyncClient) -> None:
        """Of its 200 MiB, never more than a few are in the gateway's memory."""
        async with await Uploading(server, MIB).send() as warm:  # what the first upload of a process needs for good
            await http.delete(f"/v1/files/{(await warm.json())['id']}")
        before = psutil.Process(server.pid).memory_info().rss
        upload = Uploading(server, MAX_FILE)
        async with await upload.send() as answer:
            assert answer.status == 200
            file = await answer.json()
        assert file["bytes"] == MAX_FILE
        assert [(path.name, path.stat().st_size) for path in large(server)] == [(file["id"], MAX_FILE)]
        assert upload.peak - before < 64 * MIB
        assert (await http.delete(f"/v1/files/{file['id']}")).status_code == 200
        assert large(server) == []

    async def test_a_byte_too_many_is_413_and_leaves_nothing(self, server: Server) -> None:
        async with await Uploading(server, MAX_FILE + 1).send() as answer:
            assert answer.status == 413
            error = (await answer.json())["error"]
        assert (error["code"], error["param"]) == ("request_too_large", "file")
        assert str(MAX_FILE) in error["message"], "it says how large it may be"
        assert large(server) == []


class TestLines:
    async def test_fifty_thousand_are_a_batch_and_one_more_is_none(self, http: httpx.AsyncClient) -> None:
        batch = await start(http, lines(MAX_LINES))
        running = await no_longer(http, batch, "validating")
        assert (running["status"], running["request_counts"]["total"]) == ("in_progress", MAX_LINES)
        refused = await no_longer(http, await start(http, lines(MAX_LINES + 1)), "validating")
        assert refused["status"] == "failed"
        (error,) = refused["errors"]["data"]
        assert error["code"] == "too_many_tasks"
        assert str(MAX_LINES) in error["message"], "it says how many there may be"
        await http.post(f"/v1/batches/{batch}/cancel")
        ended = await no_longer(http, batch, "in_progress", "cancelling")
        assert ended["status"] == "cancelled"
        assert ended["request_counts"] == {"total": MAX_LINES, "completed": 0, "failed": MAX_LINES}


class TestOthersFirst:
    async def test_interactive_jobs_start_before_the_lines_that_wait(self, http: httpx.AsyncClient) -> None:
        """Nothing here ends by itself, so every job can be looked at: what gives way is cancelled by hand."""
        batch = await start(http, lines(12, max_tokens=100_000))

        async def jobs(**filters: str) -> list[dict[str, Any]]:
            reply = await http.get("/v1/jobs", params={"limit": "500", **filters})
            return [job for job in reply.json()["data"] if job["status"] in ("queued", "running")]

        async def of_the_batch(status: str) -> list[dict[str, Any]]:
            return [job for job in await jobs(status=status) if job["metadata"].get("batch_id") == batch]

        async def give_way(all_of: list[dict[str, Any]]) -> None:
            for job in all_of:
                await http.post(f"/v1/jobs/{job['id']}/cancel")

        # Of four slots one is kept free of lines.
        first = await poll(lambda: of_the_batch("running"), lambda seen: len(seen) == 3)
        waiting = await poll(lambda: of_the_batch("queued"), lambda seen: len(seen) == 9)
        asked = [await submit(http, priority="interactive", user_id="i", max_tokens=100_000) for _ in range(4)]
        await give_way(first)
        mine = await poll(lambda: jobs(user_id="i", status="running"), lambda seen: len(seen) == len(asked))
        left = await of_the_batch("queued")
        assert {job["id"] for job in left} == {job["id"] for job in waiting}, "every free slot went to who asked"
        await give_way(mine)
        later = await poll(lambda: of_the_batch("running"), lambda seen: len(seen) == 3)
        assert max(job["started_at"] for job in mine) < min(job["started_at"] for job in later)
        await http.post(f"/v1/batches/{batch}/cancel")
        ended = await no_longer(http, batch, "in_progress", "cancelling")
        assert ended["request_counts"] == {"total": 12, "completed": 0, "failed": 12}
