"""What an older version left when it was killed goes on under this one: nothing is lost, repeated or forgotten.

The archives in ``stored`` were written by that version's own code (`tests.support.stored` has how): jobs that ran, that
waited and that were done, a batch, a response in the background, a chat with log-probabilities in the middle of its
stream, each under an idempotency key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.testing.oracle import check_log
from tests.support import stored
from tests.support.redis import RedisServer
from tests.support.server import PATIENCE, Server, wait_for
from tests.support.sse import Event, Parser

STORED = Path(__file__).parent / "stored"


@dataclass
class Upgraded:
    """A server of this version on what an older one left (``past``), and a client of it."""

    past: dict[str, Any]
    server: Server
    client: httpx.Client

    def again(self, call: dict[str, Any], path: str, **changed: Any) -> httpx.Response:
        """The same call under the same key."""
        headers = {"idempotency-key": call["key"]}
        return self.client.post(path, json=call["body"] | changed, headers=headers)

    def events(self, path: str) -> list[Event]:
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return Parser().feed(answer.content)

    def get(self, path: str) -> Any:
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module", params=sorted(path.name for path in STORED.glob("*.tar.xz")))
def upgraded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgraded]:
    folder = tmp_path_factory.mktemp("upgraded")
    past = stored.unpack(STORED / request.param, folder / "data")
    redis = RedisServer(folder / "redis")
    if "redis" in request.param:
        redis.start()
        stored.restore(folder / "data", redis)
    server = stored.server(folder / "server", folder / "data", rate=200, redis=redis.url if redis.process else "")
    try:
        server.start()
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            yield Upgraded(past, server, client)
        assert "Traceback" not in server.output() + server.errors()
    finally:
        server.stop()
        redis.stop()


def texts(tokens: int) -> Callable[[str], bool]:
    """Is it what the synthetic engine says in so many tokens, under whatever attempts?"""

    def right(text: str) -> bool:
        words = [word.split("@") for word in text.split()]
        attempts = [int(attempt) for _, attempt in words]
        return [int(position) for position, _ in words] == list(range(1, tokens + 1)) and attempts == sorted(attempts)

    return right


def test_jobs_that_ran_or_waited_complete(upgraded: Upgraded) -> None:
    for job in upgraded.past["jobs"]:
        events = upgraded.events(f"/v1/jobs/{job['id']}/events")
        check_log(events)
        choices = job["body"].get("n", 1)
        for choice in range(choices):
            own = [event.data["token"] for event in events[:-1] if event.data.get("index", 0) == choice]
            assert texts(40)("".join(own)), own
        seen = [(event.id, event.text) for event in events][: len(job.get("seen", []))]
        assert seen == [tuple(each) for each in job.get("seen", [])], "what was delivered is another now"
        assert events[-1].data["status"] == "completed"
        assert events[-1].data["usage"]["completion_tokens"] == 40 * choices


def test_a_reader_goes_on_behind_what_it_had(upgraded: Upgraded) -> None:
    for job in upgraded.past["jobs"][:3]:
        last = int(job["seen"][-1][0])
        events = upgraded.events(f"/v1/jobs/{job['id']}/events?after={last}")
        assert [int(event.id or 0) for event in events] == list(range(last + 1, 40 * job["body"].get("n", 1) + 2))


def test_keys_find_their_jobs(upgraded: Upgraded) -> None:
    for job in upgraded.past["jobs"]:
        assert upgraded.again(job, "/v1/jobs").json()["id"] == job["id"]
        assert upgraded.again(job, "/v1/jobs", max_tokens=41).status_code == 422


@pytest.mark.parametrize("number", range(len(stored.ANSWERED)))
def test_what_was_answered_is_answered_again_by_its_key(upgraded: Upgraded, number: int) -> None:
    call = upgraded.past["answered"][number]
    answer = upgraded.again(call, call["path"])
    assert answer.status_code in (200, 202), answer.text
    assert answer.json()[call["field"]] == call["id"]
    assert upgraded.again(call, call["path"], temperature=0.123).status_code == 422


def test_a_chat_goes_on_with_its_log_probabilities(upgraded: Upgraded) -> None:
    chat = upgraded.past["chat"]
    answer = upgraded.again(chat, "/v1/chat/completions")
    assert answer.status_code == 200, answer.text
    events = Parser().feed(answer.content)
    assert [event.text for event in events[:1]] == [chat["seen"][0][1]]  # the role; what follows may come together
    chunks = [event.data for event in events if event.text != "[DONE]"]
    before = [json.loads(text) for _, text in chat["seen"]]
    assert {chunk["id"] for chunk in chunks} == {before[0]["id"]}

    def text(chunks: list[Any]) -> str:
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])

    entries = [
        entry
        for chunk in chunks
        for choice in chunk["choices"]
        for entry in (choice.get("logprobs") or {}).get("content") or []
    ]
    assert text(chunks).startswith(text(before))
    assert len(entries) == chat["body"]["max_tokens"]
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) >= 2 for entry in entries)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]][-1] == "length"


def test_a_response_in_the_background_completes(upgraded: Upgraded) -> None:
    asked = upgraded.past["response"]
    path = f"/v1/responses/{asked['id']}"
    wait_for(lambda: upgraded.get(path)["status"] not in ("queued", "in_progress"), "the response")
    response = upgraded.get(path)
    assert response["status"] in ("completed", "incomplete"), response
    [message] = response["output"]
    assert texts(50)(message["content"][0]["text"])
    assert upgraded.again(asked, "/v1/responses").json()["id"] == asked["id"]
    numbers = [event.data["sequence_number"] for event in upgraded.events(f"{path}?stream=true&starting_after=3")]
    assert numbers == list(range(4, 4 + len(numbers)))


def test_a_batch_completes_and_runs_no_line_twice(upgraded: Upgraded) -> None:
    past = upgraded.past
    path = f"/v1/batches/{past['batch']}"
    wait_for(lambda: upgraded.get(path)["status"] == "completed", "the batch")
    batch = upgraded.get(path)
    assert batch["request_counts"] == {"total": stored.LINES, "completed": stored.LINES, "failed": 0}
    lines = [
        json.loads(line)
        for line in upgraded.client.get(f"/v1/files/{batch['output_file_id']}/content").text.splitlines()
    ]
    assert sorted(line["custom_id"] for line in lines) == sorted(f"line-{number}" for number in range(stored.LINES))
    assert all(texts(stored.LINE_TOKENS)(line["response"]["body"]["choices"][0]["text"]) for line in lines)
    assert {past["file"], batch["output_file_id"]} <= {each["id"] for each in upgraded.get("/v1/files")["data"]}
    assert [each["id"] for each in upgraded.get("/v1/batches")["data"]] == [past["batch"]]


def test_everything_is_still_listed(upgraded: Upgraded) -> None:
    for job in upgraded.past["jobs"]:
        upgraded.events(f"/v1/jobs/{job['id']}/events")
    listed = {job["id"]: job for job in upgraded.get("/v1/jobs?limit=100")["data"]}
    ids = {call["id"] for call in upgraded.past["answered"] if call["path"] in ("/v1/jobs", "/v1/generate")}
    ids |= {job["id"] for job in upgraded.past["jobs"]}
    assert ids <= set(listed)
    assert {listed[id]["status"] for id in ids} == {"completed"}
