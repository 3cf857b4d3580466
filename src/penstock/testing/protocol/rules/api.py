"""What the specification takes for granted of the routes around the streams (docs/api.md)."""

from __future__ import annotations

import msgspec

from penstock.api import (
    DoneEvent,
    Generated,
    JobPage,
    JobView,
    ModelList,
    Submitted,
    TokenEvent,
)
from penstock.testing.protocol.rule import expect, expect_equal, rule, skip
from penstock.testing.protocol.server import Server


@rule("api.errors", "Every failure is JSON of one shape: error with message, type, param and code")
async def errors(server: Server) -> None:
    body = await server.request()
    nobody = f"/v1/jobs/job_{'0' * 32}"
    for method, path, status, code, arguments in (
        ("GET", nobody, 404, "not_found", {}),
        ("DELETE", nobody, 404, "not_found", {}),
        ("POST", f"{nobody}/cancel", 404, "not_found", {}),
        ("GET", "/v1/no-such-route", 404, "not_found", {}),
        ("PUT", "/v1/jobs", 405, "invalid_request", {}),
        ("POST", "/v1/jobs", 400, "invalid_request", {"content": "{"}),
        ("POST", "/v1/jobs", 400, "invalid_request", {"json": []}),
        ("POST", "/v1/jobs", 400, "invalid_request", {"json": {**body, "no_such_field": 1}}),
        ("POST", "/v1/jobs", 404, "model_not_found", {"json": {**body, "model": server.key()}}),
    ):
        answer = await server.json(method, path, status, **arguments)
        error = answer.get("error")
        expect(isinstance(error, dict), f"{method} {path} answers {answer!r}")
        assert isinstance(error, dict)
        expect_equal(set(error), {"message", "type", "param", "code"}, f"the set of fields of {method} {path}")
        expect_equal(error["code"], code, f"the code of {method} {path}")
        expect(isinstance(error["message"], str) and error["message"], f"{method} {path} fails without a message")


@rule("api.types", "Answers and events have the fields that penstock.api says, so that every client can read them")
async def types(server: Server) -> None:
    job, stream = await server.finished()
    seen = {
        "POST /v1/jobs": (Submitted, await server.json("POST", "/v1/jobs", 202, json=await server.request(1))),
        "POST /v1/generate": (Generated, await server.json("POST", "/v1/generate", json=await server.request(1))),
        "GET /v1/jobs/{id}": (JobView, await server.json("GET", f"/v1/jobs/{job}")),
        "GET /v1/jobs": (JobPage, await server.json("GET", "/v1/jobs", params={"limit": 3})),
        "GET /v1/models": (ModelList, await server.json("GET", "/v1/models")),
        "the event token": (TokenEvent, stream.blocks[0].json()),
        "the event done": (DoneEvent, stream.blocks[-1].json()),
    }
    for what, (kind, value) in seen.items():
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            expect(False, f"{what}: {error}")


@rule("api.limits", "A value out of its range is 400, and param names the field")
async def limits(server: Server) -> None:
    for field, value in (
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("top_p", 1.5),
        ("n", 0),
        ("priority", "urgent"),
        ("prompt", 7),
    ):
        answer = await server.json("POST", "/v1/jobs", 400, json={**await server.request(), field: value})
        param = (answer.get("error") or {}).get("param")
        expect(str(param).startswith(field), f"param of {field}={value!r} is {param!r}")


@rule("api.cancel", "A cancelled job ends as cancelled and stays so; cancelling again, or an ended job, is harmless")
async def cancel(server: Server) -> None:
    ended, _ = await server.finished()
    view = await server.json("POST", f"/v1/jobs/{ended}/cancel")
    expect_equal(view.get("status"), "completed", "the status of an ended job after a cancel")
    job = await server.submit(400)
    first = (await server.json("POST", f"/v1/jobs/{job}/cancel")).get("status")
    again = (await server.json("POST", f"/v1/jobs/{job}/cancel")).get("status")
    expect_equal(again, first, "the status after a second cancel")
    if first == "completed":
        skip("every job ends before it can be cancelled")
    expect_equal(first, "cancelled", "the status after a cancel")


@rule("api.delete", "A deleted job is gone, whatever it was doing")
async def delete(server: Server) -> None:
    for tokens in (1, 400):
        job = await server.submit(tokens)
        if tokens == 1:
            await server.settled(job)
        answer = await server.json("DELETE", f"/v1/jobs/{job}")
        expect_equal((answer.get("id"), answer.get("deleted")), (job, True), "the answer")
        for path in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events"):
            await server.json("GET", path, 404)


@rule("api.list", "A list is newest first, in pages without gap or repeat, while jobs arrive")
async def pages(server: Server) -> None:
    user = server.key()
    jobs = [await server.submit(1, user_id=user) for _ in range(5)]
    seen: list[str] = []
    cursor: dict[str, str] = {}
    for _ in range(len(jobs)):
        page = await server.json("GET", "/v1/jobs", params={"user_id": user, "limit": 2, **cursor})
        seen += [str(job.get("id")) for job in page.get("data") or ()]
        if page.get("next_cursor") is None:
            break
        cursor = {"cursor": str(page["next_cursor"])}
        await server.submit(1, user_id=user)
    expect_equal(sorted(seen), sorted(jobs), "what all pages have")
    for wrong in ({"limit": 0}, {"limit": 501}, {"status": "asleep"}, {"no_such_parameter": 1}):
        await server.json("GET", "/v1/jobs", 400, params=wrong)
