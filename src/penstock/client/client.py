"""The two faces: `Client` for ordinary code, `AsyncClient` for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Unpack

import httpx

from penstock.api import JobSummary, JobView, ModelView, Submitted
from penstock.client.core import Core, as_messages
from penstock.client.results import (
    End,
    JobRef,
    Messages,
    OnProgress,
    OnRetry,
    Options,
    Prompt,
    Result,
    Token,
)
from penstock.client.wire import DEFAULT_URL, AsyncWire, BlockingWire, http_options, iterate, run


class Client:
    """A Penstock server, for ordinary (blocking) code. Threads may share one.

    *give_up*: seconds without any progress after which a call or a stream raises its last failure (0: at the first).
    *timeout*: seconds of silence on a connection after which it counts as lost; above the server's heartbeat (10 s).
    *headers* go with every request, for instance to a proxy that authenticates. *on_retry* is told of every failure
    that is retried, and of the seconds until then.

    Every method raises `penstock.core.errors.PenstockError`s: what the server answered, `Unreachable`, `ProtocolError`.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        give_up: float = 60.0,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
        on_retry: OnRetry | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(transport=transport, **http_options(url, headers, timeout))
        self._core = Core(BlockingWire(self._http), give_up, on_retry)

    def submit(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> Submitted:
        """Queue a job; returns once the server has it for good. Give a *prompt* (text or token ids) or *messages*."""
        return run(self._core.submit(prompt, messages, options))

    def job(self, job: JobRef) -> JobView:
        """How the job stands; with result, usage and timings once it has ended."""
        return run(self._core.job(job))

    def jobs(
        self,
        *,
        status: Sequence[str] = (),
        model: str | None = None,
        user_id: str | None = None,
        limit: int | None = None,
    ) -> Iterator[JobSummary]:
        """Jobs, the newest first, fetched page by page; at most *limit* of them."""
        return iterate(self._core.jobs(status, model, user_id, limit))

    def cancel(self, job: JobRef) -> JobView:
        """Stop the job, whatever it is doing; no-op for one that has ended. Returns how it stands."""
        return run(self._core.cancel(job))

    def stream(self, job: JobRef, after: int = 0) -> Generator[Token | End, None, None]:
        """The job's tokens behind position *after*, each exactly once, then its `End`. Resumes by itself.

        The end of a job that failed or was cancelled is an `End` with an ``error`` as well. A stream that had
        delivered its end before (*after* is its position) yields nothing.
        Raises `LogRewound` when the log is shorter than *after*, `NotFound` for an unknown job.
        """
        return iterate(self._core.stream(job, after))

    def result(self, job: JobRef) -> Result:
        """Wait for the job's end. Raises its error unless it completed."""
        return run(self._core.result(job))

    def generate(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> Result:
        """Submit and wait. The job is cancelled if this is interrupted."""
        return run(self._core.generate(prompt, messages, options))

    def generate_stream(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> Generator[Token, None, None]:
        """Submit and stream the tokens. Raises the job's error; the job is cancelled if the generator is closed early.

        For the usage or the finish reason, ``submit`` and ``stream`` instead.
        """
        return iterate(self._core.generate_stream(prompt, messages, options))

    def chat(self, messages: str | Messages, **options: Unpack[Options]) -> Result:
        """The model's answer to *messages* (a text is one user message)."""
        return run(self._core.generate(None, as_messages(messages), options))

    def models(self) -> list[ModelView]:
        """What is served; the first is the default."""
        return run(self._core.models())

    def load_model(self, model: str, on_progress: OnProgress | None = None) -> ModelView:
        """Load a model now and wait until it is ready. For its operator: ask the process whose worker has it.

        Raises `ModelLoadError`; `Unsupported` from a gateway without workers.
        """
        return run(self._core.manage(model, "load", on_progress))

    def unload_model(self, model: str, on_progress: OnProgress | None = None) -> ModelView:
        """Unload a model, as `load_model` loads one. A job for it loads it again."""
        return run(self._core.manage(model, "unload", on_progress))

    def health(self) -> dict[str, Any]:
        """The server's view of itself: broker, workers, models, queue."""
        return run(self._core.health())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """A Penstock server, for asyncio. Everything as in `Client`, awaited.

    Close a stream that you leave early: ``async with contextlib.aclosing(client.stream(job)) as events``.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        give_up: float = 60.0,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
        on_retry: OnRetry | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(transport=transport, **http_options(url, headers, timeout))
        self._core = Core(AsyncWire(self._http), give_up, on_retry)

    async def submit(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> Submitted:
        return await self._core.submit(prompt, messages, options)

    async def job(self, job: JobRef) -> JobView:
        return await self._core.job(job)

    def jobs(
        self,
        *,
        status: Sequence[str] = (),
        model: str | None = None,
        user_id: str | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[JobSummary, None]:
        return self._core.jobs(status, model, user_id, limit)

    async def cancel(self, job: JobRef) -> JobView:
        return await self._core.cancel(job)

    def stream(self, job: JobRef, after: int = 0) -> AsyncGenerator[Token | End, None]:
        return self._core.stream(job, after)

    async def result(self, job: JobRef) -> Result:
        return await self._core.result(job)

    async def generate(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> Result:
        return await self._core.generate(prompt, messages, options)

    def generate_stream(
        self, prompt: Prompt | None = None, *, messages: Messages | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Token, None]:
        return self._core.generate_stream(prompt, messages, options)

    async def chat(self, messages: str | Messages, **options: Unpack[Options]) -> Result:
        return await self._core.generate(None, as_messages(messages), options)

    async def models(self) -> list[ModelView]:
        return await self._core.models()

    async def load_model(self, model: str, on_progress: OnProgress | None = None) -> ModelView:
        return await self._core.manage(model, "load", on_progress)

    async def unload_model(self, model: str, on_progress: OnProgress | None = None) -> ModelView:
        return await self._core.manage(model, "unload", on_progress)

    async def health(self) -> dict[str, Any]:
        return await self._core.health()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
