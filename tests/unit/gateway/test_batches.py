"""Batches in process, over a real broker: what an input is, and that a runner which dies loses and repeats nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.brokers.embedded import EmbeddedBroker
from penstock.core.errors import ErrorInfo, InvalidRequest, NotFound
from penstock.core.job import Job, Message, Priority, Request, new_job_id
from penstock.core.ports import Append, Finish, ModelInfo, QueuePolicy, WorkerInfo
from penstock.gateway.batches.input import MAX_ERRORS, MAX_LINES, check_input, read_lines
from penstock.gateway.batches.routes import view
from penstock.gateway.batches.runner import BatchRunner
from penstock.gateway.batches.slots import MAX_OPEN
from penstock.gateway.batches.store import WINDOW, Batch, BatchStore
from penstock.gateway.config import GatewayConfig
from penstock.gateway.dialects.registry import BATCHABLE
from penstock.gateway.dialects.responses.bodies import CreateResponse
from penstock.gateway.dialects.responses.items import Item
from penstock.gateway.files.store import FileStore, StoredFile
from penstock.gateway.gateway import Gateway
from penstock.testing.clock import ManualClock

CHAT = "/v1/chat/completions"
PATIENCE = 60.0


def line(number: int, *, url: str = CHAT, **body: Any) -> dict[str, Any]:
    whole = {"model": "m", "messages": [{"role": "user", "content": f"say {number}"}], "max_tokens": 2, **body}
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": whole}


def jsonl(lines: Iterable[Any]) -> bytes:
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)


# ---------------------------------------------------------------------------------------------- the input


class TestInput:
    def check(self, tmp_path: Path, data: bytes, limit: int = 10_000) -> Any:
        path = tmp_path / "input.jsonl"
        path.write_bytes(data)
        return check_input(path, CHAT, limit)

    def test_a_good_one(self, tmp_path: Path) -> None:
        data = b"\xef\xbb\xbf" + jsonl([line(1), b"", line(2)]) + b"\r\n" + json.dumps(line(3)).encode()
        checked = self.check(tmp_path, data)
        assert (checked.total, checked.model, checked.line, checked.errors) == (3, "m", 1, [])
        numbers = [number for number, _ in read_lines(tmp_path / "input.jsonl", 10_000)]
        assert numbers == [1, 3, 5], "as an editor counts them"

    @pytest.mark.parametrize(
        ("bad", "code", "param"),
        [
            (b'{"custom_id": "x"', "invalid_json_line", None),
            (b"nonsense", "invalid_json_line", None),
            (b'{"custom_id":"x","method":"POST","url":"/v1/completions","body":{"model":}}', "invalid_json_line", None),
            (b"\xff\xfe", "invalid_json_line", None),
            (b"[1, 2]", "invalid_request", None),
            (b'"text"', "invalid_request", None),
            ({**line(2), "custom_id": 7}, "invalid_request", "custom_id"),
            ({**line(2), "custom_id": ""}, "invalid_request", "custom_id"),
            ({k: v for k, v in line(2).items() if k != "custom_id"}, "missing_required_parameter", "custom_id"),
            ({key: value for key, value in line(2).items() if key != "method"}, "missing_required_parameter", "method"),
            ({key: value for key, value in line(2).items() if key != "url"}, "missing_required_parameter", "url"),
            ({key: value for key, value in line(2).items() if key != "body"}, "missing_required_parameter", "body"),
            ({**line(2), "method": "GET"}, "invalid_method", "method"),
            ({**line(2), "url": "/v1/completions"}, "url_mismatch", "url"),
            ({**line(2), "body": "text"}, "invalid_request", "body"),
            ({**line(2), "body": {}}, "missing_required_parameter", "body.model"),
            (line(2, model="another"), "model_mismatch", "body.model"),
            (line(2, model=5), "invalid_request", "body.model"),
            (line(1), "duplicate_custom_id", "custom_id"),
            (line(2, messages=[{"role": "user", "content": "x" * 20_000}]), "request_too_large", "body"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_with_a_line(self, tmp_path: Path, bad: Any, code: str, param: str | None) -> None:
        checked = self.check(tmp_path, jsonl([line(1), bad, line(3)]))
        (error,) = checked.errors
        assert (error.code, error.param, error.line) == (code, param, 2)
        assert error.message

    def test_every_line_is_told_up_to_a_hundred(self, tmp_path: Path) -> None:
        assert [error.line for error in self.check(tmp_path, jsonl([b"x", line(1), b"x"])).errors] == [1, 3]
        assert len(self.check(tmp_path, jsonl([b"x"] * 500)).errors) == MAX_ERRORS

    @pytest.mark.parametrize("data", [b"", b"\n \n\t\r\n"])
    def test_nothing(self, tmp_path: Path, data: bytes) -> None:
        (error,) = self.check(tmp_path, data).errors
        assert (error.code, error.line) == ("empty_file", None)

    def test_fifty_thousand_lines_and_one_more(self, tmp_path: Path) -> None:
        body = {"model": "m", "prompt": "x"}
        lines = (
            b'{"custom_id":"%d","method":"POST","url":"/v1/chat/completions","body":%b}'
            % (number, json.dumps(body).encode())
            for number in range(MAX_LINES + 1)
        )
        data = jsonl(lines)
        (error,) = self.check(tmp_path, data).errors
        assert error.code == "too_many_tasks"
        assert self.check(tmp_path, data[: data.rindex(b"\n", 0, -1) + 1]).total == MAX_LINES

    @given(st.lists(st.binary(max_size=30), max_size=8), st.integers(1, 20))
    def test_lines_of_any_bytes(self, parts: list[bytes], limit: int) -> None:
        """Each line once, under its number; what is longer than the limit is cut and nothing of it becomes a line."""
        data = b"\n".join(part.replace(b"\n", b"") for part in parts)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x"
            path.write_bytes(data)
            got = {number: text.rstrip(b"\n") for number, text in read_lines(path, limit)}
        expected = {}
        for number, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if text and not text.isspace():
                expected[number] = text
        assert got.keys() >= {number for number, text in expected.items() if not text[: limit + 1].isspace()}
        assert all(expected[number].startswith(text) for number, text in got.items())
        assert all(got[number] == text for number, text in expected.items() if number in got and len(text) <= limit - 3)


# ---------------------------------------------------------------------------------------------- the store


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path: Path, clock: ManualClock) -> BatchStore:
    return BatchStore(FileStore(tmp_path / "files", clock=clock))


def put(files: FileStore, lines: Iterable[Any], tenant: str = "t") -> StoredFile:
    with files.upload(tenant) as upload:
        upload.write(jsonl(lines))
        return upload.keep("in.jsonl", "batch")


class TestStore:
    def test_its_input_is_its_own(self, store: BatchStore) -> None:
        file = put(store.files, [line(1)])
        batch = store.create("t", CHAT, file)
        store.files.delete("t", file.id)
        assert (store.folder_of("t", batch.id) / "input.jsonl").read_bytes() == jsonl([line(1)])
        assert store.get("t", batch.id) == batch
        with pytest.raises(NotFound):
            store.get("another", batch.id)
        with pytest.raises(NotFound):
            store.create("t", CHAT, file)
        assert store.ids("t") == [batch.id]
        assert list(store.files.folder("t", "tmp").iterdir()) == []

    def test_pages(self, store: BatchStore, clock: ManualClock) -> None:
        file = put(store.files, [line(1)])
        ids = []
        for _ in range(5):
            ids.append(store.create("t", CHAT, file).id)
            clock.advance(0.01)
        first, more = store.list("t", limit=3)
        rest, none = store.list("t", after=first[-1].id, limit=3)
        assert [batch.id for batch in first + rest] == ids[::-1]
        assert (more, none) == (True, False)

    def test_a_wish_to_cancel_is_seen_at_once_and_kept(self, store: BatchStore, clock: ManualClock) -> None:
        batch = store.create("t", CHAT, put(store.files, [line(1)]))
        for _ in range(2):
            assert store.cancel("t", batch.id).status == "cancelling"
            assert store.get("t", batch.id).moments["cancelling"] == 1_700_000_000.0
            clock.advance(5)
        batch.enter("completed", clock.now())  # it was too late
        store.save("t", batch)
        assert store.get("t", batch.id).status == "completed"
        with pytest.raises(InvalidRequest, match="completed"):
            store.cancel("t", batch.id)

    def test_one_runner_a_tenant(self, store: BatchStore) -> None:
        import os

        first = store.lock("t")
        assert first is not None
        assert store.lock("t") is None
        other = store.lock("another")
        assert other is not None
        os.close(first)
        again = store.lock("t")
        assert again is not None
        os.close(again)
        os.close(other)

    def test_it_is_forgotten_long_after_its_end(self, store: BatchStore, clock: ManualClock) -> None:
        batch = store.create("t", CHAT, put(store.files, [line(1)]))
        clock.advance(store.files.ttl + 1)
        store.sweep()
        store.get("t", batch.id)
        assert (store.folder_of("t", batch.id) / "input.jsonl").exists()
        batch.enter("completed", clock.now())
        store.save("t", batch)  # and its runner died before it cleaned up
        clock.advance(store.files.ttl - 1)
        store.sweep()
        store.get("t", batch.id)
        assert [path.name for path in store.folder_of("t", batch.id).iterdir()] == ["batch.json"]
        clock.advance(2)
        store.sweep()
        with pytest.raises(NotFound):
            store.get("t", batch.id)
        assert list(store.files.folder("t", "tmp").iterdir()) == []

    def test_what_openai_says_of_it(self) -> None:
        batch = Batch(id="batch_x", endpoint=CHAT, input_file_id="file-x", created_at=1.9, expires_at=1.9 + WINDOW)
        assert view(batch).expires_at - view(batch).created_at == 86_400
        assert view(batch).errors is None
        batch.output_file_id = "file-y"
        assert view(batch).output_file_id is None, "not before it can be read"
        batch.enter("completed", 5.5)
        assert (view(batch).output_file_id, view(batch).completed_at) == ("file-y", 5)


# ---------------------------------------------------------------------------------------------- the runner


class House:
    """A broker, a worker that does everything at once, and a gateway whose runner comes and goes."""

    def __init__(self, folder: Path, *, window: int = 8, clock: ManualClock | None = None) -> None:
        self.folder = folder
        self.broker = EmbeddedBroker(folder / "broker", policy=QueuePolicy(max_queued_per_tenant=100))
        self.store = BatchStore(FileStore(folder / "files", clock=clock))
        self.window = window
        self.working = True
        self.resting = asyncio.Event()
        self.fails: dict[str, ErrorInfo] = {}
        self.runs: list[str] = []

    async def __aenter__(self) -> House:
        await self.broker.open()
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        await self.broker.close()

    async def _work(self) -> None:
        info = WorkerInfo(id="w", slots=8, models=(ModelInfo(name="m", engine="e", context_length=100),))
        while True:
            if not self.working:
                self.resting.set()
            for lease in await self.broker.claim(info, ["m"], 8 if self.working else 0, 0.01):
                prompt = lease.job.request.messages[-1].content  # type: ignore[index]
                self.runs.append(prompt)
                error = self.fails.get(prompt)
                finish = Finish(error=error) if error else Finish(("stop",))
                await self.broker.append([Append(lease.key, 1, [1, 2], ["a", prompt], prompt_tokens=3, finish=finish)])
            await asyncio.sleep(0)

    async def rest(self) -> None:
        """Run no jobs from now on; a claim that is under way has ended when this returns."""
        self.working = False
        self.resting.clear()
        await self.resting.wait()

    @contextlib.asynccontextmanager
    async def runner(self, models: tuple[str, ...] = ("m",)) -> AsyncIterator[BatchRunner]:
        gateway = Gateway(self.broker, GatewayConfig(models=models))
        runner = BatchRunner(gateway.jobs, self.store, BATCHABLE, window=self.window, interval=0.02)
        async with gateway.running(), runner.running():
            yield runner

    def batch(self, lines: Iterable[Any]) -> Batch:
        return self.store.create("t", CHAT, put(self.store.files, lines))

    async def until(self, batch: Batch, condition: Any) -> Batch:
        async with asyncio.timeout(PATIENCE):
            while not condition(found := self.store.get("t", batch.id)):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        return found

    async def until_run(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.runs) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def end(self, batch: Batch) -> Batch:
        return await self.until(batch, lambda found: found.ended)

    def results(self, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
        """Entries of the output and of the errors, by custom_id."""
        found = []
        for id in (batch.output_file_id, batch.error_file_id):
            lines = self.store.files.path("t", id).read_bytes().splitlines() if id is not None else []
            entries = [json.loads(each) for each in lines]
            by_id = {entry["custom_id"]: entry for entry in entries}
            assert len(by_id) == len(entries), "a line has two results"
            found.append(by_id)
        assert not found[0].keys() & found[1].keys()
        return found[0], found[1]

    def open_files(self) -> int:
        """How many files of batches this process has open."""
        return sum("/batches/batch_" in each.path for each in psutil.Process().open_files())

    def jobs_ever(self) -> int:
        """How many jobs the broker has taken in all its life."""
        with contextlib.closing(sqlite3.connect(self.folder / "broker" / "penstock.db")) as database:
            row = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").fetchone()
        return int(row[0]) if row else 0

    async def jobs_left(self) -> int:
        return sum((await self.broker.stats()).jobs.values())


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with House(tmp_path) as house:
        yield house


class TestRunner:
    async def test_good_lines_bad_lines_and_lines_that_fail(self, house: House) -> None:
        house.fails["say 3"] = ErrorInfo("it broke", "server_error", None, "engine_error")
        lines = [line(1), line(2, temperature=9), line(3), line(4, stream=True), line(5)]
        async with house.runner():
            batch = await house.end(house.batch(lines))
            place = house.store.folder_of("t", batch.id)
            await house.until(batch, lambda _: [path.name for path in place.iterdir()] == ["batch.json"])
        output, errors = house.results(batch)
        assert batch.state == "completed"
        assert (batch.total, batch.completed, batch.failed) == (5, 2, 3)
        assert output.keys() == {"id-1", "id-5"}
        entry = output["id-1"]
        assert entry["error"] is None
        assert entry["response"]["status_code"] == 200
        assert entry["response"]["request_id"] == f"{batch.id}.1"
        assert entry["response"]["body"]["choices"][0]["message"]["content"] == "asay 1"
        assert {id: each["response"]["status_code"] for id, each in errors.items()} == {
            "id-2": 400, "id-3": 500, "id-4": 400,
        }  # fmt: skip
        assert errors["id-2"]["response"]["body"]["error"]["param"] == "temperature"
        assert errors["id-3"]["response"]["body"]["error"]["code"] == "engine_error"
        assert errors["id-4"]["response"]["body"]["error"]["code"] == "unsupported"
        assert (batch.prompt_tokens, batch.completion_tokens) == (6, 4)
        assert await house.jobs_left() == 0
        assert house.jobs_ever() == 3

    async def test_a_bad_input_runs_nothing(self, house: House) -> None:
        async with house.runner():
            batch = await house.end(house.batch([line(1), b"nonsense"]))
            unknown = await house.end(house.batch([line(1, model="nobody")]))
        assert batch.state == unknown.state == "failed"
        assert [error.line for error in batch.errors] == [2]
        assert [error.code for error in unknown.errors] == ["model_not_found"]
        assert (batch.output_file_id, batch.error_file_id) == (None, None)
        assert house.jobs_ever() == 0

    async def test_several_share_the_window(self, house: House) -> None:
        await house.rest()
        async with house.runner():
            batches = [house.batch(line(n) for n in range(30)) for _ in range(3)]
            for batch in batches:
                await house.until(batch, lambda found: found.state == "in_progress")
            async with asyncio.timeout(PATIENCE):
                while (await house.broker.stats()).queued < house.window:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            for _ in range(20):
                await asyncio.sleep(0.005)
                stats = await house.broker.stats()
                assert stats.depth == {("m", Priority.BATCH): house.window}
            house.working = True
            for batch in batches:
                assert (await house.end(batch)).completed == 30

    async def test_a_model_that_is_away_holds_up_no_others_batches(self, house: House) -> None:
        async with house.runner(models=("m", "n")):
            away = house.batch(line(n, model="n") for n in range(30))
            await house.until(away, lambda found: found.submitted > 0)
            while (await house.broker.stats()).queued < house.window:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert (await house.end(house.batch(line(n) for n in range(30)))).completed == 30

    async def test_many_that_wait_hold_no_files_open(self, house: House) -> None:
        await house.rest()
        async with house.runner() as runner:
            file = put(house.store.files, [line(1), line(2)])
            batches = [house.store.create("t", CHAT, file) for _ in range(MAX_OPEN + 20)]
            for batch in batches:
                await house.until(batch, lambda found: found.state == "in_progress")
            assert 0 < house.open_files() <= 3 * MAX_OPEN
            house.store.cancel("t", batches[-1].id)
            runner.notify()
            assert (await house.end(batches[-1])).state == "cancelled"
            house.working = True
            for batch in batches[:-1]:
                assert (await house.end(batch)).completed == 2

    async def test_a_full_queue_is_waited_for(self, tmp_path: Path) -> None:
        async with House(tmp_path, window=500) as house:  # more than the queue takes
            async with house.runner():
                batch = await house.end(house.batch(line(n) for n in range(300)))
            assert (batch.completed, batch.failed) == (300, 0)
            assert house.jobs_ever() == 300

    async def test_cancelled_lines_are_told_and_done_ones_kept(self, house: House) -> None:
        async with house.runner() as runner:
            batch = house.batch(line(n) for n in range(200))
            await house.until(batch, lambda _: len(house.runs) > 20)
            house.working = False
            house.store.cancel("t", batch.id)
            runner.notify()
            batch = await house.end(batch)
        output, errors = house.results(batch)
        assert batch.state == "cancelled"
        assert len(output) + len(errors) == batch.total == 200
        assert (batch.completed, batch.failed) == (len(output), len(errors))
        assert len(output) > 10
        assert {entry["error"]["code"] for entry in errors.values()} == {"batch_cancelled"}
        assert all(entry["response"] is None for entry in errors.values())
        assert await house.jobs_left() == 0
        assert {f"id-{prompt.removeprefix('say ')}" for prompt in house.runs} >= output.keys()

    async def test_a_cancelled_batch_that_nobody_ran_yet(self, house: House) -> None:
        batch = house.batch(line(n) for n in range(20))
        house.store.cancel("t", batch.id)
        async with house.runner():
            batch = await house.end(batch)
        assert (batch.state, batch.output_file_id, batch.failed) == ("cancelled", None, 20)
        assert house.jobs_ever() == 0

    async def test_a_day_is_all_that_it_has(self, tmp_path: Path) -> None:
        clock = ManualClock(__import__("time").time())
        async with House(tmp_path, clock=clock) as house, house.runner():
            batch = house.batch(line(n) for n in range(50))
            await house.until(batch, lambda _: len(house.runs) > 10)
            house.working = False
            clock.advance(WINDOW + 1)
            batch = await house.end(batch)
            output, errors = house.results(batch)
            assert batch.state == "expired"
            assert len(output) >= 8
            assert len(output) + len(errors) == 50
            assert {entry["error"]["code"] for entry in errors.values()} == {"batch_expired"}
            assert await house.jobs_left() == 0

    async def test_a_batch_of_each_tenant(self, house: House) -> None:
        async with house.runner():
            mine = house.store.create("t", CHAT, put(house.store.files, [line(1)]))
            theirs = house.store.create("u", CHAT, put(house.store.files, [line(2)], "u"))
            async with asyncio.timeout(PATIENCE):
                while not (house.store.get("t", mine.id).ended and house.store.get("u", theirs.id).ended):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert house.store.files.list("u", purpose="batch_output", limit=5)[0][0].id == (
            house.store.get("u", theirs.id).output_file_id
        )

    async def test_an_output_lives_as_long_as_was_asked_for(self, house: House) -> None:
        async with house.runner():
            file = put(house.store.files, [line(1)])
            batch = await house.end(house.store.create("t", CHAT, file, output_ttl=3600))
        output = house.store.files.get("t", batch.output_file_id or "")
        assert output.expires_at == output.created_at + 3600
        assert output.filename == f"{batch.id}_output.jsonl"


class TestDeaths:
    """A runner that is gone from one moment to the next, again and again, at any of its steps."""

    @settings(max_examples=25)
    @given(seed=st.integers(0, 2**32), deaths=st.lists(st.floats(0, 0.03), max_size=12), torn=st.binary(max_size=60))
    def test_every_line_once_whenever_it_dies(self, seed: int, deaths: list[float], torn: bytes) -> None:
        async def story() -> None:
            rng = random.Random(seed)
            with tempfile.TemporaryDirectory() as folder:
                async with House(Path(folder)) as house:
                    batch = house.batch(line(n, **({"temperature": 9} if n % 10 == 7 else {})) for n in range(40))
                    for life in deaths:
                        async with house.runner():
                            await asyncio.sleep(life)
                        house.working = rng.random() < 0.8
                        place = house.store.folder_of("t", batch.id)
                        for name in ("output.jsonl", "errors.jsonl"):
                            if (place / name).exists() and house.store.get("t", batch.id).state == "in_progress":
                                with (place / name).open("ab") as file:
                                    file.write(torn.replace(b"\n", b""))
                    house.working = True
                    async with house.runner():
                        batch = await house.end(batch)
                    output, errors = house.results(batch)
                    assert output.keys() == {f"id-{n}" for n in range(40) if n % 10 != 7}
                    assert errors.keys() == {f"id-{n}" for n in range(40) if n % 10 == 7}
                    assert (batch.total, batch.completed, batch.failed) == (40, 36, 4)
                    assert sorted(house.runs) == sorted(f"say {n}" for n in range(40) if n % 10 != 7), "no line twice"
                    assert house.jobs_ever() == 36
                    assert await house.jobs_left() == 0

        asyncio.run(story())

    async def test_a_line_that_ran_needs_what_it_refers_to_no_more(self, house: House) -> None:
        """Its runner dies before the result is written, and the response that it goes on from is dropped meanwhile."""
        first = Job(
            id=new_job_id(),
            tenant="t",
            request=Request(model="m", messages=(Message("user", "say 0"),)),
            view=CreateResponse(model="m", input="say 0").view((Item("message", role="user", content=("say 0",)),)),
        )
        await house.broker.submit(first)
        await house.until_run(1)
        await house.rest()
        before = "resp_" + first.id.removeprefix("job_")
        url = "/v1/responses"
        lines = [line(n, url=url, input=f"say {n}", max_tokens=None, previous_response_id=before) for n in (1, 2)]
        batch = house.store.create("t", url, put(house.store.files, lines))
        async with house.runner():
            await house.until(batch, lambda _: house.jobs_ever() == 3)
        await house.broker.forget("t", first.id)
        house.working = True
        async with house.runner():
            batch = await house.end(batch)
        output, errors = house.results(batch)
        assert (sorted(output), errors) == (["id-1", "id-2"], {})
        (message,) = output["id-2"]["response"]["body"]["output"]
        assert message["content"][0]["text"] == "asay 2"
        assert house.jobs_ever() == 3

    async def test_a_cancelled_batch_also_stops_the_jobs_of_a_dead_runner(self, house: House) -> None:
        await house.rest()
        batch = house.batch(line(n) for n in range(20))
        async with house.runner():
            await house.until(batch, lambda _: house.jobs_ever() == house.window)
        house.store.cancel("t", batch.id)
        async with house.runner():
            batch = await house.end(batch)
        assert (batch.state, batch.completed, batch.failed) == ("cancelled", 0, 20)
        _, errors = house.results(batch)
        assert {entry["error"]["code"] for entry in errors.values()} == {"batch_cancelled"}
        assert await house.jobs_left() == 0

    async def test_two_runners_at_once(self, house: House) -> None:
        """One has the lock; when it goes the other one takes over."""
        async with contextlib.AsyncExitStack() as stack:
            first = contextlib.AsyncExitStack()
            await first.enter_async_context(house.runner())
            await stack.enter_async_context(house.runner())
            batch = house.batch(line(n) for n in range(300))
            await house.until(batch, lambda _: len(house.runs) > 50)
            await first.aclose()
            batch = await house.end(batch)
        assert batch.completed == 300
        assert house.jobs_ever() == 300
        assert sorted(house.runs) == sorted(f"say {n}" for n in range(300))
