"""What an older version left when it was killed in the middle of everything, and what has to become of it.

A stored past is an archive in ``tests/integration/stored``: the data directory (and over Redis, every key, as ``DUMP``
gives it), and ``past.json``, which says what was asked for and how much of it had been seen. To make one with the code
of a release, in a checkout of this repository with its environment::

    git worktree add /tmp/old v0.1.0
    PYTHONPATH=/tmp/old/src python -m tests.support.stored embedded tests/integration/stored/0.1.0-embedded.tar.xz
    PYTHONPATH=/tmp/old/src python -m tests.support.stored redis tests/integration/stored/0.1.0-redis.tar.xz
"""

from __future__ import annotations

import contextlib
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec

from tests.support.redis import RedisServer
from tests.support.server import PATIENCE, Server, model, wait_for

#: Seconds for which results are kept: no archive is older.
FOR_EVER = 100 * 365 * 86400.0
#: Tokens of each line of the batch, and its lines.
LINE_TOKENS, LINES = 30, 8
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"name": "add", "description": "Adds.", "parameters": SCHEMA}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]

#: Calls with an idempotency key that were answered, one of each route and kind of field: (path, body, the id's field).
ANSWERED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/jobs", {"prompt": "a job", "max_tokens": 5, "user_id": "u", "metadata": {"a": "b"}}, "id"),
    ("/v1/jobs", {"messages": MESSAGES, "max_tokens": 4, "priority": "batch", "n": 2, "deadline": 3600}, "id"),
    (
        "/v1/completions",
        {"model": "synthetic", "prompt": "text", "max_tokens": 4, "temperature": 0.5, "seed": None, "user": "u"},
        "id",
    ),
    ("/v1/completions", {"model": "millrace", "prompt": "x", "max_tokens": 4, "logprobs": 2, "stop": ["###"]}, "id"),
    (
        "/v1/chat/completions",
        {"model": "synthetic", "messages": MESSAGES, "max_completion_tokens": 3, "stream": False},
        "id",
    ),
    (
        "/v1/chat/completions",
        {
            "model": "millrace",
            "messages": MESSAGES,
            "max_tokens": 20,
            "temperature": 0,
            "top_p": 0.9,
            "tools": [{"type": "function", "function": TOOL}],
            "tool_choice": "auto",
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"5": -1},
        },
        "id",
    ),
    (
        "/v1/chat/completions",
        {
            "model": "millrace",
            "messages": MESSAGES,
            "max_tokens": 30,
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
        },
        "id",
    ),
    (
        "/v1/responses",
        {"model": "synthetic", "input": "hello", "max_output_tokens": 16, "instructions": "Be brief."},
        "id",
    ),
    (
        "/v1/responses",
        {
            "model": "millrace",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
            "max_output_tokens": 16,
            "tools": [{"type": "function", **TOOL, "strict": False}],
        },
        "id",
    ),
    ("/v1/messages", {"model": "synthetic", "messages": MESSAGES[1:], "max_tokens": 4, "system": "Be brief."}, "id"),
    ("/v1/generate", {"prompt": "generate", "max_tokens": 3}, "job_id"),
]


def server(folder: Path, data_dir: Path, *, rate: float, redis: str = "") -> Server:
    """One over the past in *data_dir* (and *redis*): a model that runs at *rate*, and the small one in the box."""
    settings: dict[str, object] = {"result_ttl": FOR_EVER, "file_ttl": FOR_EVER, "files_dir": str(data_dir / "files")}
    if redis:
        settings |= {"broker": redis, "broker_prefix": "past"}
    models = [model(rate=rate, slots=4), model("millrace", engine="openvino")]
    return Server(folder, models=models, settings=settings, data_dir=data_dir)


# ---------------------------------------------------------------------------------------------- making one


def make(archive: Path, kind: str) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        data = folder / "data"
        redis = RedisServer(folder / "redis")
        stack.callback(redis.stop)
        if kind == "redis":
            redis.start()
        old = server(folder / "server", data, rate=20, redis=redis.url if kind == "redis" else "")
        stack.callback(old.stop)
        past = _live(old.start())
        (data / "past.json").write_text(json.dumps(past, indent=1))
        if kind == "redis":
            with contextlib.closing(redis.client()) as client:
                keys = {key: client.dump(key) for key in sorted(client.scan_iter(count=1000))}
            (data / "redis").write_bytes(msgspec.msgpack.encode(list(keys.items())))
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive, "w:xz", preset=9) as tar:
            for path in sorted(data.rglob("*")):
                if path.is_file():
                    tar.add(path, path.relative_to(data))
    print(f"{archive}: {archive.stat().st_size} bytes")


def _live(old: Server) -> dict[str, Any]:
    """Ask for everything, and kill the server in the middle of it. What was asked, and what of it was seen."""
    with httpx.Client(base_url=old.url, timeout=PATIENCE, trust_env=False) as client:
        past: dict[str, Any] = {"answered": [], "jobs": []}
        for number, (path, body, field) in enumerate(ANSWERED):
            reply = _call(client, path, body, f"answered-{number}")
            past["answered"].append(
                {"path": path, "body": body, "key": f"answered-{number}", "id": reply[field], "field": field}
            )
        for call in past["answered"]:
            if call["path"] == "/v1/jobs":
                wait_for(lambda id=call["id"]: _job(client, id)["status"] == "completed", "the job")

        lines = "".join(
            json.dumps(
                {
                    "custom_id": f"line-{number}",
                    "method": "POST",
                    "url": "/v1/completions",
                    "body": {"model": "synthetic", "prompt": f"line {number}", "max_tokens": LINE_TOKENS},
                }
            )
            + "\n"
            for number in range(LINES)
        )
        file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("lines.jsonl", lines)}).json()
        request = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=request).json()
        past |= {"file": file["id"], "batch": batch["id"]}
        wait_for(lambda: client.get(f"/v1/batches/{batch['id']}").json()["request_counts"]["completed"], "a line")

        body = {"model": "synthetic", "input": "hello", "max_output_tokens": 50, "background": True}
        past["response"] = {
            "id": _call(client, "/v1/responses", body, "response")["id"],
            "body": body,
            "key": "response",
        }
        for number in range(8):
            body = {
                "prompt": f"job {number}",
                "max_tokens": 40,
                "user_id": "u",
                "priority": "interactive" if number < 3 else "batch",
            }
            if number == 1:
                body["n"] = 2
            id = _call(client, "/v1/jobs", body, f"job-{number}")["id"]
            past["jobs"].append({"id": id, "body": body, "key": f"job-{number}"})
        for job in past["jobs"][:3]:
            job["seen"] = _read(client, f"/v1/jobs/{job['id']}/events", 6)
        body = {
            "model": "millrace",
            "messages": MESSAGES,
            "max_tokens": 900,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 2,
            "stream": True,
        }
        past["chat"] = {"body": body, "key": "chat"}
        past["chat"]["seen"] = _read(client, "/v1/chat/completions", 20, method="POST", json=body, headers=_key("chat"))
        old.kill9()
    return past


def _key(key: str) -> dict[str, str]:
    return {"idempotency-key": key}


def _call(client: httpx.Client, path: str, body: dict[str, Any], key: str) -> Any:
    answer = client.post(path, json=body, headers=_key(key))
    assert answer.status_code in (200, 202), (path, answer.text)
    return answer.json()


def _job(client: httpx.Client, id: str) -> Any:
    return client.get(f"/v1/jobs/{id}").json()


def _read(client: httpx.Client, path: str, count: int, *, method: str = "GET", **request: Any) -> list[list[str]]:
    """The first *count* events of a stream: (id, data)."""
    seen: list[list[str]] = []
    with client.stream(method, path, **request) as answer:
        assert answer.status_code == 200, answer.read()
        id = ""
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                id = value
            elif name == "data":
                seen.append([id, value])
                if len(seen) == count:
                    break
    return seen


# ---------------------------------------------------------------------------------------------- using one


def unpack(archive: Path, folder: Path) -> dict[str, Any]:
    """Put the past into *folder*, as if it had been left a moment ago; what was asked, and what of it was seen."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    for path in folder.glob("files/*/batches/*/batch.json"):
        batch = json.loads(path.read_text())
        batch["expires_at"] = time.time() + 3600  # it has a day, from its creation on
        path.write_text(json.dumps(batch))
    return json.loads((folder / "past.json").read_text())


def restore(folder: Path, redis: RedisServer) -> None:
    """Put the keys of the past in *folder* into *redis*."""
    with contextlib.closing(redis.client()) as client:
        for key, value in msgspec.msgpack.decode((folder / "redis").read_bytes()):
            client.restore(key, 0, value)


if __name__ == "__main__":
    make(Path(sys.argv[2]), sys.argv[1])
