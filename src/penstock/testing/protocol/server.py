"""The server that is held against the protocol: requests to it, streams of it, and one job that many rules look at."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from penstock.testing.protocol.stream import NoAnswer, Stream

#: A request that every model can serve.
PROMPT = "Once upon a time there was a"
TOKENS = 8


class Server:
    """*patience*: seconds after which what has not come counts as missing; above the server's heartbeat. *model*: the
    server's first one by default. `forget_all` deletes what was submitted here."""

    def __init__(self, http: httpx.AsyncClient, *, model: str | None = None, patience: float = 30.0) -> None:
        self.http = http
        self.patience = patience
        self._model = model
        self._run = secrets.token_hex(4)
        self._jobs: set[str] = set()
        self._finished: dict[int, tuple[str, Stream]] = {}

    # ------------------------------------------------------------------------------------ requests

    def key(self) -> str:
        """A key or a user that nobody has used."""
        return f"protocol-{self._run}-{secrets.token_hex(4)}"

    async def call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            async with asyncio.timeout(self.patience):
                response = await self.http.request(method, path, **arguments)
        except TimeoutError as error:
            raise NoAnswer(f"{method} {path} is not answered within {self.patience:g} s") from error
        self._remember(response)
        return response

    async def json(self, method: str, path: str, status: int = 200, **arguments: Any) -> dict[str, Any]:
        """The object that is answered with *status*, or `NoAnswer`."""
        response = await self.call(method, path, **arguments)
        try:
            value = response.json()
        except ValueError:
            value = None
        if response.status_code != status or not isinstance(value, dict):
            kind = response.headers.get("content-type", "no content type")
            seen = f"{response.status_code} {kind}: {response.text[:160]!r}"
            raise NoAnswer(f"{method} {path} answers {seen}, not a JSON object and {status}")
        return value

    async def model(self) -> str:
        if self._model is None:
            served = (await self.json("GET", "/v1/models")).get("data") or [{}]
            self._model = str(served[0].get("id"))
        return self._model

    async def request(self, tokens: int = TOKENS, **fields: Any) -> dict[str, Any]:
        """The body of a request of *tokens* tokens."""
        return {"model": await self.model(), "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, **fields}

    async def chat(self, tokens: int = TOKENS, **fields: Any) -> dict[str, Any]:
        """The same as a chat request."""
        body = await self.request(tokens, **fields)
        return {"messages": [{"role": "user", "content": body.pop("prompt")}], **body}

    async def submit(self, tokens: int = TOKENS, headers: Mapping[str, str] | None = None, **fields: Any) -> str:
        """The id of a new job."""
        body = await self.request(tokens, **fields)
        return str((await self.json("POST", "/v1/jobs", 202, json=body, headers=headers)).get("id"))

    # ------------------------------------------------------------------------------------ streams

    @contextlib.asynccontextmanager
    async def open(self, method: str, path: str, **arguments: Any) -> AsyncIterator[Stream]:
        """A response whose body is read bit by bit."""
        request = self.http.build_request(method, path, **arguments)
        try:
            async with asyncio.timeout(self.patience):
                response = await self.http.send(request, stream=True)
        except TimeoutError as error:
            raise NoAnswer(f"{method} {path} is not answered within {self.patience:g} s") from error
        self._remember(response)
        try:
            yield Stream(response, self.patience)
        finally:
            await response.aclose()

    async def stream(self, method: str, path: str, **arguments: Any) -> Stream:
        """A response, read to its end."""
        async with self.open(method, path, **arguments) as stream:
            return await stream.read_all()

    async def events(self, job: str, after: int | str | None = None) -> Stream:
        """The log of *job* behind *after*, to its end."""
        headers = {} if after is None else {"last-event-id": str(after)}
        return await self.stream("GET", f"/v1/jobs/{job}/events", headers=headers)

    async def finished(self, n: int = 1) -> tuple[str, Stream]:
        """A job of *n* choices that has ended, and its whole stream. The same one for all rules."""
        if n not in self._finished:
            job = await (self.submit(n=n) if n > 1 else self.submit())
            self._finished[n] = job, await self.events(job)
        return self._finished[n]

    async def settled(self, job: str) -> dict[str, Any]:
        """The job once it has ended."""
        try:
            async with asyncio.timeout(self.patience):
                while True:
                    view = await self.json("GET", f"/v1/jobs/{job}")
                    if view.get("status") not in ("queued", "running"):
                        return view
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise NoAnswer(f"{job} has not ended within {self.patience:g} s") from error

    def _remember(self, response: httpx.Response) -> None:
        """The job that was made, to be deleted in the end."""
        job = response.headers.get("x-penstock-job") or response.headers.get("location", "").rpartition("/")[2]
        if job:
            self._jobs.add(job)

    async def forget_all(self) -> None:
        """Delete what was submitted here."""
        for job in self._jobs:
            with contextlib.suppress(httpx.HTTPError, NoAnswer):
                await self.http.delete(f"/v1/jobs/{job}")
