"""Files and batches by the official ``openai`` Python SDK, unchanged; and what kills do to a batch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from tests.support.api import check_error, text_of
from tests.support.fleet import GatewayProcess, WorkerProcess
from tests.support.redis import RedisServer
from tests.support.server import PATIENCE, Server, model, wait_for

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with client(server.url) as made:
        yield made


def line(number: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": "synthetic", "max_tokens": 3, **body}
    if url == CHAT:
        fields.setdefault("messages", [{"role": "user", "content": f"say {number}"}])
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": fields}


def jsonl(lines: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def start(sdk: openai.OpenAI, lines: Iterable[Any], endpoint: Any = CHAT, **fields: Any) -> Batch:
    file = sdk.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return sdk.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def end(sdk: openai.OpenAI, batch: Batch) -> Batch:
    def ended() -> Batch | None:
        found = sdk.batches.retrieve(batch.id)
        return found if found.status in ENDED else None

    found: Batch = wait_for(ended, "the batch ends")
    return found


def results(sdk: openai.OpenAI, file: str | None) -> dict[str, Any]:
    assert file is not None
    entries = [json.loads(each) for each in sdk.files.content(file).text.splitlines()]
    found = {entry["custom_id"]: entry for entry in entries}
    assert len(found) == len(entries), "a line has two results"
    return found


class TestFiles:
    def test_a_file_comes_and_goes(self, sdk: openai.OpenAI) -> None:
        data = jsonl([line(1), line(2)])
        made = sdk.files.create(file=("requests.jsonl", data), purpose="batch")
        assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(data), "requests.jsonl", "batch")
        assert sdk.files.retrieve(made.id) == made
        assert sdk.files.content(made.id).content == data
        assert made.id in [each.id for each in sdk.files.list(purpose="batch", limit=10)]
        assert sdk.files.delete(made.id).deleted
        for call in (sdk.files.retrieve, sdk.files.content, sdk.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(made.id)

    def test_lists_are_paged(self, sdk: openai.OpenAI) -> None:
        made = [sdk.files.create(file=(f"{n}.jsonl", b"{}\n"), purpose="batch").id for n in range(5)]
        page = sdk.files.list(limit=2, order="desc")
        assert [each.id for each in page.data] == made[:2:-1]
        everything = [each.id for each in sdk.files.list(limit=2, order="desc")]
        assert everything[:5] == made[::-1]
        for id in made:
            sdk.files.delete(id)

    def test_from_a_path_and_from_an_open_file(self, sdk: openai.OpenAI, tmp_path: Path) -> None:
        data = jsonl([line(1), line(2)])
        path = tmp_path / "in.jsonl"
        path.write_bytes(data)
        with path.open("rb") as opened:
            made = [sdk.files.create(file=each, purpose="batch") for each in (path, opened)]
        for file in made:
            assert (file.filename, file.bytes) == ("in.jsonl", len(data))
            assert sdk.files.wait_for_processing(file.id).status == "processed"
            with sdk.files.with_streaming_response.content(file.id) as reply:
                assert b"".join(reply.iter_bytes()) == data
            sdk.files.delete(file.id)

    async def test_a_part_of_one(self, http: httpx.AsyncClient) -> None:
        made = await http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", b"0123456789")})
        path = f"/v1/files/{made.json()['id']}/content"
        for given, status, content in (
            ("bytes=2-4", 206, b"234"),
            ("bytes=-3", 206, b"789"),
            ("bytes=7-", 206, b"789"),
            ("bytes=0-99", 206, b"0123456789"),
        ):
            reply = await http.get(path, headers={"Range": given})
            assert (reply.status_code, reply.content) == (status, content), given
        behind = await http.get(path, headers={"Range": "bytes=10-"})
        check_error(behind, 416, "invalid_request")
        assert behind.headers["content-range"] == "bytes */10"
        for given in ("bytes=nonsense", "lines=1-2", "bytes"):
            check_error(await http.get(path, headers={"Range": given}), 400, "invalid_request")

    async def test_what_is_no_upload_is_refused(self, http: httpx.AsyncClient) -> None:
        file = {"file": ("x", b"{}")}
        for fields, files, code in (
            ({}, file, "invalid_request"),
            ({"purpose": "batch"}, None, "invalid_request"),
            ({"purpose": "nonsense"}, file, "unsupported"),
        ):
            reply = await http.post("/v1/files", data=fields, files=files)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, code), reply.text

    async def test_a_form_of_very_many_parts_is_refused(self, http: httpx.AsyncClient) -> None:
        reply = await http.post("/v1/files", files=[(f"field{n}", (None, b"")) for n in range(1000)])
        check_error(reply, 413, "request_too_large")

    async def test_one_that_is_deleted_meanwhile_is_whole_or_not_found(self, http: httpx.AsyncClient) -> None:
        data = b"x" * 3000
        for _ in range(20):
            made = await http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", data)})
            path = f"/v1/files/{made.json()['id']}"
            calls = [http.get(f"{path}/content") for _ in range(8)]
            calls.insert(4, http.delete(path))
            for reply in await asyncio.gather(*calls):
                if reply.status_code != 200:
                    check_error(reply, 404, "not_found", "file_id")
                elif reply.request.method == "GET":
                    assert reply.content == data

    def test_how_long_one_is_kept(self, sdk: openai.OpenAI) -> None:
        """An hour to thirty days; thirty, if nothing is said."""
        plain = sdk.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
        assert plain.expires_at is not None
        assert plain.expires_at - plain.created_at == 30 * 86_400
        for seconds in (3600, 30 * 86_400):
            kept = sdk.files.create(
                file=("in.jsonl", b"{}\n"),
                purpose="batch",
                expires_after={"anchor": "created_at", "seconds": seconds},
            )
            assert kept.expires_at is not None
            assert kept.expires_at - kept.created_at == seconds
        for seconds in (3599, 30 * 86_400 + 1):
            with pytest.raises(openai.BadRequestError) as caught:
                sdk.files.create(
                    file=("in.jsonl", b"{}\n"),
                    purpose="batch",
                    expires_after={"anchor": "created_at", "seconds": seconds},
                )
            assert caught.value.param == "expires_after.seconds"

    def test_an_upload_beyond_the_limit_leaves_nothing(self, make_server: Callable[..., Server]) -> None:
        server = make_server(settings={"max_file": 1 << 20})
        with client(server.url) as sdk:
            with pytest.raises(openai.APIStatusError) as caught:
                sdk.files.create(file=("big.jsonl", b"x" * (1 << 20) + b"yy"), purpose="batch")
            assert caught.value.status_code == 413
            form = httpx.Request("POST", server.url, data={"purpose": "batch"}, files={"file": ("in.jsonl", b"{}")})
            parts = iter([form.read(), b"x" * (2 << 20)])  # what is behind the form counts, too
            headers = {"content-type": form.headers["content-type"]}
            with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
                reply = http.post("/v1/files", content=parts, headers=headers)
            check_error(reply, 413, "request_too_large", "file")
            assert list(sdk.files.list()) == []
        left = [path for path in (server.data_dir / "files").rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in left) < 1000, left


class TestBatches:
    def test_a_line_may_have_what_a_body_may(self, sdk: openai.OpenAI) -> None:
        """Nulls, integral floats, what asks for nothing; what is refused is refused by its field's name."""
        batch = start(
            sdk,
            [
                line(1, max_tokens=2.0, stream=None, n=None, stream_options={"include_usage": None}, stop=""),
                line(2, max_tokens=9, max_completion_tokens=2, tool_choice=None, top_logprobs=0),
                line(3, max_tokens=2.5),
                line(4, guided_json={"type": "object"}, guided_regex="a"),
            ],
        )
        ended = end(sdk, batch)
        assert (ended.request_counts.completed, ended.request_counts.failed) == (2, 2)  # type: ignore[union-attr]
        for result in results(sdk, ended.output_file_id).values():
            assert result["response"]["body"]["choices"][0]["message"]["content"] == text_of(2)
        refused = {
            id: result["response"]["body"]["error"]["param"] for id, result in results(sdk, ended.error_file_id).items()
        }
        assert refused == {"id-3": "max_tokens", "id-4": "guided_regex"}

    def test_chat_completions(self, sdk: openai.OpenAI) -> None:
        batch = start(sdk, (line(n) for n in range(20)), metadata={"night": "one"})
        assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", CHAT, "24h")
        batch = end(sdk, batch)
        assert batch.status == "completed"
        assert batch.metadata == {"night": "one"}
        assert batch.error_file_id is None
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (20, 20, 0)
        output = results(sdk, batch.output_file_id)
        assert output.keys() == {f"id-{n}" for n in range(20)}
        for entry in output.values():
            assert entry["error"] is None
            assert entry["response"]["status_code"] == 200
            reply = openai.types.chat.ChatCompletion.model_validate(entry["response"]["body"])
            assert reply.choices[0].message.content == text_of(3)
        assert batch.id in [each.id for each in sdk.batches.list(limit=5)]

    def test_a_result_is_one_line_whatever_splits_the_lines(self, sdk: openai.OpenAI) -> None:
        """Unicode has more line ends than JSON; the SDK's ``iter_lines`` knows them all."""
        odd = [
            f"a{end}b" for end in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r\n", "é\U0001f600")
        ]
        lines = [
            {**line(n, **({"temperature": 9} if bad else {})), "custom_id": f"{bad}{id}"}
            for n, id in enumerate(odd)
            for bad in (0, 1)
        ]
        batch = end(sdk, start(sdk, lines))
        for bad, file in ((0, batch.output_file_id), (1, batch.error_file_id)):
            assert file is not None
            content = sdk.files.content(file)
            assert content.content.isascii()
            found = [json.loads(each)["custom_id"] for each in content.iter_lines()]
            assert sorted(found) == sorted(f"{bad}{id}" for id in odd)

    def test_completions(self, sdk: openai.OpenAI) -> None:
        lines = (line(n, "/v1/completions", prompt="say it") for n in range(3))
        batch = end(sdk, start(sdk, lines, "/v1/completions"))
        (first, *_) = results(sdk, batch.output_file_id).values()
        assert first["response"]["body"]["choices"][0]["text"] == text_of(3)

    def test_lists_are_paged(self, sdk: openai.OpenAI) -> None:
        made = [start(sdk, [line(1)]).id for _ in range(5)]
        listed = [batch.id for batch in sdk.batches.list(limit=2)]
        assert listed[:5] == made[::-1]

    def test_a_line_that_fails_takes_no_other_along(self, sdk: openai.OpenAI) -> None:
        lines = [line(n, **({"temperature": 9} if n == 2 else {})) for n in range(4)]
        batch = end(sdk, start(sdk, lines))
        assert batch.status == "completed"
        assert results(sdk, batch.output_file_id).keys() == {"id-0", "id-1", "id-3"}
        ((_, failed),) = results(sdk, batch.error_file_id).items()
        assert failed["custom_id"] == "id-2"
        assert failed["response"]["status_code"] == 400
        assert failed["response"]["body"]["error"]["param"] == "temperature"

    def test_an_input_with_faults_is_not_run_and_each_is_named(self, sdk: openai.OpenAI) -> None:
        lines = [line(1), {**line(2), "url": "/v1/completions"}, {**line(1), "method": "GET"}]
        batch = end(sdk, start(sdk, lines))
        assert batch.status == "failed"
        assert batch.output_file_id is None
        assert batch.errors is not None
        found = {(each.line, each.code) for each in batch.errors.data or []}
        assert found == {(2, "url_mismatch"), (3, "duplicate_custom_id"), (3, "invalid_method")}

    def test_a_cancelled_batch_keeps_what_is_done(self, sdk: openai.OpenAI) -> None:
        batch = start(sdk, (line(n, model="paced", max_tokens=100_000) for n in range(3)))
        wait_for(lambda: sdk.batches.retrieve(batch.id).status == "in_progress", "it runs")
        assert sdk.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        batch = end(sdk, batch)
        assert batch.status == "cancelled"
        assert {entry["error"]["code"] for entry in results(sdk, batch.error_file_id).values()} == {"batch_cancelled"}

    def test_what_cannot_be_a_batch_is_refused(self, sdk: openai.OpenAI) -> None:
        file = sdk.files.create(file=("in.jsonl", jsonl([line(1)])), purpose="batch")
        with pytest.raises(openai.BadRequestError):
            sdk.batches.create(input_file_id=file.id, endpoint="/v1/moderations", completion_window="24h")
        with pytest.raises(openai.NotFoundError):
            sdk.batches.create(input_file_id="file-" + "0" * 32, endpoint=CHAT, completion_window="24h")
        window: Any = "1h"
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window=window)
        assert caught.value.param == "completion_window"


class TestFaults:
    def test_kills_run_no_line_twice_and_lose_none(self, make_server: Callable[..., Server]) -> None:
        lines = 300
        server = make_server(rate=200, options={"slots": 16}, settings={"lease_ttl": 1.0})
        with client(server.url) as sdk:
            batch = start(sdk, (line(n, max_tokens=10) for n in range(lines)))
            for done in (20, 120, 220):

                def far_enough(done: int = done) -> bool:
                    counts = sdk.batches.retrieve(batch.id).request_counts
                    return counts is not None and counts.completed >= done

                wait_for(far_enough, f"{done} lines are done")
                server.kill9()
                server.start()
            batch = end(sdk, batch)
            assert batch.status == "completed"
            output = results(sdk, batch.output_file_id)
            assert output.keys() == {f"id-{n}" for n in range(lines)}
            jobs = {entry["response"]["body"]["id"] for entry in output.values()}
            assert len(jobs) == lines
            # Each job that ever ended is in the request log of the life that ran it: none beside those of the output.
            ended = {each["job_id"] for each in server.log_lines() if each.get("event") == "job_ended"}
            assert len(ended) > lines // 2  # a kill may tear the last lines of a log
            assert {"job_" + id.removeprefix("chatcmpl-") for id in jobs} >= ended
            assert httpx.get(f"{server.url}/v1/jobs", trust_env=False).json()["data"] == [], (
                "lines leave no jobs behind"
            )

    def test_another_gateway_goes_on(self, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("batches")
        shared = {"files_dir": str(folder / "files"), "broker_prefix": "batches-two-gateways", "lease_ttl": 1.0}
        settings = {**shared, "models": [model(rate=200, slots=16)]}
        first = GatewayProcess(folder / "one", redis_server.url, settings=settings)
        second = GatewayProcess(folder / "two", redis_server.url, settings=settings)
        worker = WorkerProcess(folder / "worker", redis_server.url, settings=settings)
        try:
            for process in (worker, first, second):
                process.start()
            with client(first.url) as sdk:
                batch = start(sdk, (line(n, max_tokens=10) for n in range(200)))
            with client(second.url) as sdk:
                wait_for(lambda: sdk.batches.retrieve(batch.id).status == "in_progress", "it runs")
                first.kill9()
                batch = end(sdk, batch)
                assert batch.status == "completed"
                assert results(sdk, batch.output_file_id).keys() == {f"id-{n}" for n in range(200)}
        finally:
            for process in (first, second, worker):
                process.stop()
