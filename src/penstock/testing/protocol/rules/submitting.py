"""2. Submitting, and idempotency."""

from __future__ import annotations

import json
import re

from penstock.testing.protocol.rule import expect, expect_equal, rule
from penstock.testing.protocol.server import Server


@rule("2.1", "POST /v1/jobs answers 202 with the id of a job that can be found, and does not wait for its end")
async def accepted(server: Server) -> None:
    body = await server.request(tokens=64)
    answer = await server.json("POST", "/v1/jobs", 202, json=body)
    expect(answer.get("status") in ("queued", "running"), f"the answer's status is {answer.get('status')!r}")
    job = str(answer.get("id"))
    view = await server.json("GET", f"/v1/jobs/{job}")
    expect_equal(view.get("id"), job, "the job's id")
    await server.json("DELETE", f"/v1/jobs/{job}")


@rule("2.2", "An id is job_ and 32 hexadecimal digits, and no other job's")
async def ids(server: Server) -> None:
    seen = [await server.submit(1) for _ in range(3)]
    expect(all(re.fullmatch(r"job_[0-9a-f]{32}", job) for job in seen), f"the ids are {seen}")
    expect_equal(len(set(seen)), 3, "the number of different ids")


@rule("2.idempotency.1", "A key is the header or the body's request_id: at most 256 printable characters")
async def keys(server: Server) -> None:
    key = server.key()
    first, again = [await server.submit(1, headers={"idempotency-key": key}) for _ in range(2)]
    expect_equal(again, first, "the job of a header's key")
    key = server.key()
    first, again = [await server.submit(1, request_id=key) for _ in range(2)]
    expect_equal(again, first, "the job of a request_id")
    longest = server.key().ljust(256, "x")
    await server.submit(1, headers={"idempotency-key": longest})
    for wrong in (longest + "x", "a\nb"):
        answer = await server.call("POST", "/v1/jobs", json=await server.request(1, request_id=wrong))
        expect_equal(answer.status_code, 400, f"the status of a key of {len(wrong)} characters, {wrong[:8]!r}")


@rule("2.idempotency.2", "Same key, route and body, however it is spelled: the first job, streams included")
async def same_job(server: Server) -> None:
    headers = {"idempotency-key": server.key(), "content-type": "application/json"}
    body = await server.request()
    first = await server.json("POST", "/v1/jobs", 202, headers=headers, content=json.dumps(body))
    spelled = json.dumps(dict(reversed(body.items())), indent=2)
    again = await server.json("POST", "/v1/jobs", 202, headers=headers, content=spelled)
    expect_equal(again.get("id"), first.get("id"), "the job of the same body in another order")
    await server.json("DELETE", f"/v1/jobs/{first.get('id')}")

    headers, body = {"idempotency-key": server.key()}, await server.request(stream=True)
    one = await server.stream("POST", "/v1/generate", headers=headers, json=body)
    two = await server.stream("POST", "/v1/generate", headers=headers, json=body)
    expect_equal(two.job, one.job, "the job of a repeated streaming request")
    expect_equal([block.data for block in two.blocks], [block.data for block in one.blocks], "its stream")


@rule("2.idempotency.3", "Same key with another body or route: 422 idempotency_mismatch")
async def mismatch(server: Server) -> None:
    headers = {"idempotency-key": server.key()}
    await server.submit(1, headers=headers)
    for path, body in (("/v1/jobs", await server.request(2)), ("/v1/generate", await server.request(1))):
        answer = await server.json("POST", path, 422, headers=headers, json=body)
        expect_equal((answer.get("error") or {}).get("code"), "idempotency_mismatch", f"the code of POST {path}")


@rule("2.idempotency.4", "A key is free once its job is gone")
async def free_again(server: Server) -> None:
    headers = {"idempotency-key": server.key()}
    first = await server.submit(1, headers=headers)
    await server.json("DELETE", f"/v1/jobs/{first}")
    expect(await server.submit(1, headers=headers) != first, "the key of a deleted job still finds it")
