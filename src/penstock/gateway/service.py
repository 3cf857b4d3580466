"""What the routes share: submitting, following and folding jobs, the catalogue of models, who is still listening."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
import structlog

from penstock.core.errors import (
    BrokerUnavailable,
    IdempotencyMismatch,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
    PenstockError,
    Unsupported,
    error_from_info,
)
from penstock.core.events import Completion, Ended, Event, fold
from penstock.core.job import Job, OnDisconnect, Priority, Request, Task, new_job_id
from penstock.core.ports import (
    WORKER_STATES,
    Broker,
    Clock,
    ModelControl,
    ModelInfo,
    Query,
    QueueStats,
    SystemClock,
    WorkerInfo,
)
from penstock.gateway.files.store import FileStore
from penstock.gateway.sse import EventStream, Streams

if TYPE_CHECKING:
    from penstock.gateway.batches.runner import BatchRunner

log = structlog.get_logger("penstock.gateway")


#: Seconds for which the job of an answer that was given stays where it could not be dropped at once.
ASK_KEEP = 60.0


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway's numbers. Times in seconds, sizes in bytes."""

    broker: str = ""
    """What kind of broker is behind it, for ``/health``."""
    models: tuple[str, ...] = ()
    """Models that are configured to be served, whether or not a worker has them up yet; the first is the default."""
    max_body: int = 1 << 20
    heartbeat: float = 10.0
    send_deadline: float = 30.0
    disconnect_grace: float = 10.0
    hold: float = 0.25
    """How long a stream's headers wait for its first event, so that an early refusal is still an HTTP error."""
    hold_long_prompt: float = 30.0
    """… where the prompt may be more than the context holds, which an engine says only when it has a slot."""
    drain_timeout: float = 5.0
    """How long JSON replies are waited for after `Gateway.drain`; then they are 503 and their jobs go on."""
    default_max_tokens: int = 2048
    """What OpenAI routes generate at most when the request does not say (and the context allows it)."""
    allowed_hosts: tuple[str, ...] = ("*",)
    allowed_origins: tuple[str, ...] = ()
    """Origins, ours beside, whose pages may use the API."""
    manageable: bool = True
    """May whoever reaches it load and unload models? There is no authentication."""


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of a job but the request itself."""

    tenant: str
    user: str | None = None
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    idempotency_key: str | None = None
    fingerprint: bytes = b""
    request_id: str | None = None
    metadata: dict[str, str] = {}
    on_disconnect: OnDisconnect = "continue"
    view: bytes = b""
    keep: float | None = None


class Catalogue:
    """Which models exist, from the configuration and from what workers say, refreshed once a second.

    *own*: the workers of this very process, of which it always knows the latest.
    """

    def __init__(self, broker: Broker, configured: tuple[str, ...], own: Callable[[], list[WorkerInfo]] = list) -> None:
        self._broker = broker
        self._configured = configured
        self._own = own
        self._known: dict[str, ModelInfo] = {}
        self.stats: QueueStats | None = None
        self.reachable = False
        self._looked_at = 0.0

    async def run(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(1.0 if self.ready(None) else 0.1)

    async def refresh(self) -> None:
        try:
            self.stats = await self._broker.stats()
        except BrokerUnavailable:
            self.reachable = False
            return
        self.reachable = True
        self._looked_at = time.monotonic()
        self._learn()

    def _learn(self) -> None:
        for worker in self.workers:
            for model in worker.models:
                if model.context_length or model.name not in self._known:
                    self._known[model.name] = model

    @property
    def workers(self) -> list[WorkerInfo]:
        """Those that are alive, as far as is known."""
        found = {worker.id: worker for worker in (self.stats.workers if self.stats is not None else ())}
        now = self.now()
        found |= {worker.id: msgspec.structs.replace(worker, seen_at=now) for worker in self._own()}
        return list(found.values())

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self._configured, *sorted(self._known)]))  # every gateway says the same

    @property
    def default(self) -> str:
        """The first model that generates (see `default_for`)."""
        return self.default_for("generate")

    def default_for(self, task: Task) -> str:
        """The first model that can do *task*, as far as is known. Raises `NoWorker`, or `Unsupported` if none can."""
        if not self.names:
            raise NoWorker("No model is served yet: no worker has registered.", retry_after=2.0)
        for name in self.names:
            if (info := self.info(name)) is None or info.may(task):
                return name
        raise Unsupported(f"No model here can {task}. Served: {', '.join(self.names)}.", param="model")

    def offering(self, task: Task) -> list[str]:
        """Models that are known to do *task*."""
        return [name for name in self.names if (info := self.info(name)) and info.context_length and info.may(task)]

    def now(self) -> float:
        """Seconds since the epoch by the store's clock, which may not be this machine's."""
        if self.stats is None:
            return time.time()
        return self.stats.now + time.monotonic() - self._looked_at

    def info(self, model: str) -> ModelInfo | None:
        """What is known of *model*; ``context_length`` 0 while it never was loaded."""
        self._learn()
        return self._known.get(model)

    def served_by(self, engine: str) -> list[str]:
        """Models that live workers serve with *engine*."""
        return [name for name in self.names if (info := self.info(name)) and info.engine == engine and self.ready(name)]

    def workers_of(self, model: str) -> list[WorkerInfo]:
        return [worker for worker in self.workers if any(info.name == model for info in worker.models)]

    def state(self, model: str) -> str:
        """The best state that it has on a live worker (`WORKER_STATES`); ``unavailable`` without any, and where it is
        away on all."""
        states = {worker.state_of(model) for worker in self.workers_of(model)}
        return next((state for state in WORKER_STATES if state in states), "unavailable")

    def ready(self, model: str | None) -> bool:
        """Does a live worker serve *model* (None: the first one), or load it when a job comes?"""
        if not self.names:
            return False
        name = model or self.names[0]
        states = [(worker.state_of(name), worker.on_demand) for worker in self.workers_of(name)]
        return any(
            state == "ready" or (on_demand and state in ("unloaded", "loading", "unloading"))
            for state, on_demand in states
        )

    def away(self, model: str) -> str:
        """Why no live worker of *model* can serve it, though they are up; empty where one can, or none is up."""
        if self.state(model) != "unavailable":
            return ""
        told = (info.away for worker in self.workers_of(model) for info in worker.models if info.name == model)
        return next(filter(None, told), "")

    def check_serving(self, model: str) -> None:
        """Raise `NoWorker` for a *model* whose jobs would only fail now."""
        if why := self.away(model):
            raise NoWorker(
                f"The model {model!r} cannot be served right now: {why}. Try again in a moment.", retry_after=2.0
            )

    def check(self, request: Request) -> None:
        """Refuse an unknown model, or a field that the model's engine cannot honour."""
        if request.model not in self._known and request.model not in self._configured:
            served = ", ".join(self.names) or "none yet"
            raise ModelNotFound(f"The model {request.model!r} does not exist here. Served: {served}.", param="model")
        if (info := self._known.get(request.model)) is None:
            return
        if not info.may(request.task):
            others = ", ".join(self.offering(request.task)) or "none"
            raise Unsupported(
                f"The model {request.model!r} cannot {request.task}: it can {' and '.join(info.tasks)}. "
                f"Models here that can {request.task}: {others}.",
                param="model",
            )
        info.check(request)


class Readers:
    """Counts who listens to a job, and cancels one that nobody listens to any more, after a grace."""

    def __init__(self, broker: Broker, grace: float) -> None:
        self._broker = broker
        self._grace = grace
        self._count: Counter[str] = Counter()
        self._timers: dict[str, asyncio.Task[None]] = {}

    def attach(self, job: str) -> None:
        self._count[job] += 1
        if (timer := self._timers.pop(job, None)) is not None:
            timer.cancel()

    def detach(self, tenant: str, job: str, *, cancel: bool) -> None:
        self._count[job] -= 1
        if self._count[job] <= 0:
            del self._count[job]
            if cancel:
                self._timers[job] = asyncio.create_task(self._cancel_later(tenant, job))

    async def _cancel_later(self, tenant: str, job: str) -> None:
        """A reader that has come back through another gateway counts as long as it stays there."""
        pause = self._grace
        while True:
            await asyncio.sleep(pause)
            pause = max(1.0, self._grace)
            try:
                found = await self._broker.get(tenant, job)
                if found.readers > 0 and not found.status.terminal:
                    continue
                if not found.status.terminal:
                    await self._broker.cancel(tenant, job)
                    log.info("job_abandoned", job_id=job, tenant=tenant)
            except BrokerUnavailable:
                continue
            except PenstockError:
                pass  # gone already
            break
        self._timers.pop(job, None)

    def close(self) -> None:
        """The gateway goes: jobs run on, their clients come back to the next one."""
        for timer in self._timers.values():
            timer.cancel()


class Following:
    """A job's events from one position on, with the first one fetched ahead. Iterate it once; then `close`."""

    def __init__(self, gateway: Gateway, job: Job, after: int = 0) -> None:
        self._gateway = gateway
        self.job = job
        self._events = gateway.broker.tail(job.tenant, job.id, after)
        self._first: asyncio.Task[Event] = asyncio.create_task(_next(self._events))
        gateway.readers.attach(job.id)
        self._open = True

    async def peek(self, hold: float) -> Event | None:
        """The first event if it comes within *hold* seconds. Raises what `Broker.tail` raises."""
        await asyncio.wait([self._first], timeout=hold)
        if not self._first.done():
            return None
        try:
            return self._first.result()
        except StopAsyncIteration:
            return None

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            yield await self._first
        except StopAsyncIteration:
            return
        async for event in self._events:
            yield event

    async def close(self, complete: bool) -> None:
        """Stop following. Unless the stream was *complete*, the job's disconnect policy applies."""
        if not self._open:
            return
        self._open = False
        if not self._first.done():
            self._first.cancel()
            with contextlib.suppress(BaseException):
                await self._first
        elif not self._first.cancelled():
            self._first.exception()
        await self._events.aclose()  # type: ignore[attr-defined]
        cancel = not complete and self.job.on_disconnect == "cancel" and not self._gateway.streams.closing
        self._gateway.readers.detach(self.job.tenant, self.job.id, cancel=cancel)


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


class Gateway:
    """The HTTP side's state: nothing that another gateway over the same broker would miss."""

    def __init__(
        self,
        broker: Broker,
        config: GatewayConfig | None = None,
        clock: Clock | None = None,
        models: ModelControl | None = None,
        files: FileStore | None = None,
    ) -> None:
        """*models*: those of workers in the same process, to be loaded and unloaded by their operator. *files*: where
        uploads are kept, if they are."""
        self.broker = broker
        self.models = models
        self.files = files
        self.batches: BatchRunner | None = None
        """Runs what is made of those files while the gateway does; set before."""
        self.config = config or GatewayConfig()
        self.clock = clock or SystemClock()
        self.streams = Streams(heartbeat=self.config.heartbeat, send_deadline=self.config.send_deadline)
        own = models.workers if models is not None else list
        self.catalogue = Catalogue(broker, self.config.models, own)
        self.readers = Readers(broker, self.config.disconnect_grace)
        self.started_at = time.time()
        self._draining = asyncio.Event()
        self._over = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self, *, catalogue: bool = True) -> AsyncIterator[None]:
        """Whoever shows its own models only needs no *catalogue* of the others'."""
        tasks = [asyncio.create_task(self.streams.run(), name="gateway: heartbeat")]
        if catalogue:
            tasks.append(asyncio.create_task(self.catalogue.run(), name="gateway: catalogue"))
        if self.batches is not None:
            tasks.append(asyncio.create_task(self.batches.run(), name="gateway: batches"))
        try:
            yield
        finally:
            self.readers.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def drain(self) -> None:
        """End every stream; the clients are told to come back. Replies in one piece get ``drain_timeout`` seconds."""
        self.streams.close()
        self._draining.set()
        asyncio.get_running_loop().call_later(self.config.drain_timeout, self._over.set)

    # ------------------------------------------------------------------------------------ submit, follow, fold

    async def submit(self, request: Request, submission: Submission) -> Job:
        """Admit and store a job; returns once it is durable."""
        if self.streams.closing:
            raise BrokerUnavailable("The server is shutting down. Try again in a moment.", retry_after=2.0)
        try:
            self.catalogue.check(request)
            self.catalogue.check_serving(request.model)
        except PenstockError:  # the model may have been there when the same was asked first
            if (known := await self.repeated(submission)) is None:
                raise
            return known
        deadline = submission.deadline
        job = Job(
            id=new_job_id(),
            tenant=submission.tenant,
            request=request,
            user=submission.user,
            priority=submission.priority,
            idempotency_key=submission.idempotency_key,
            fingerprint=submission.fingerprint,
            request_id=submission.request_id,
            metadata=submission.metadata,
            on_disconnect=submission.on_disconnect,
            view=submission.view,
            keep=submission.keep,
            deadline_at=self.clock.now() + deadline if deadline is not None else None,
        )
        stored = await self.broker.submit(job)
        if self.models is not None:
            self.models.nudge(request.model)
        return stored

    async def submit_all(self, requests: Sequence[Request], submission: Submission) -> list[Job]:
        """A job for each of *requests*, all of them or none. Under an idempotency key each has one of its own; without
        one, what is no reply is not kept: nobody comes back for it."""
        key = submission.idempotency_key
        jobs: list[Job] = []
        try:
            for number, request in enumerate(requests):
                keep = submission.keep if key or request.task == "generate" else ASK_KEEP
                one = msgspec.structs.replace(submission, idempotency_key=key and f"{key}/{number}", keep=keep)
                jobs.append(await self.submit(request, one))
        except PenstockError as error:
            if key is None:
                for job in jobs:
                    await self.broker.cancel(job.tenant, job.id)
            elif not isinstance(error, BrokerUnavailable):  # else they may be running for who asked first, or ask again
                for job in jobs:
                    await self.broker.forget(job.tenant, job.id)  # the key is to be free for the next try
            raise
        return jobs

    async def repeated(self, submission: Submission) -> Job | None:
        """The job that this is a repetition of, if it is: for what could not be accepted (any more) as a new one.

        Raises `IdempotencyMismatch` if another request had its idempotency key.
        """
        if submission.idempotency_key is None:
            return None
        query = Query(tenant=submission.tenant, idempotency_key=submission.idempotency_key)
        for job in (await self.broker.list(query)).jobs:
            if job.fingerprint != submission.fingerprint:
                raise IdempotencyMismatch
            return job
        return None

    def follow(self, job: Job, after: int = 0) -> Following:
        return Following(self, job, after)

    async def stream(
        self,
        following: Following,
        render: Callable[[AsyncIterator[Event]], AsyncIterator[bytes]],
        headers: dict[str, str] | None = None,
    ) -> EventStream:
        """An SSE response of *following*; a refusal that comes at once is raised instead of streamed."""
        headers = {"x-penstock-job": following.job.id, **(headers or {})}
        return await self.stream_all([following], render(aiter(following)), headers)

    async def stream_all(
        self, followings: Sequence[Following], blocks: AsyncIterator[bytes], headers: dict[str, str]
    ) -> EventStream:
        """The same of *blocks* that are made of several."""

        async def close(complete: bool) -> None:
            for following in followings:
                await following.close(complete)

        try:
            for first in await asyncio.gather(*map(self._first_event, followings)):
                if isinstance(first, Ended) and first.error is not None and first.position == 1:
                    raise error_from_info(first.error)
        except BaseException:
            await close(complete=True)
            raise
        return EventStream(self.streams, blocks, headers=headers, on_close=close)

    def _may_not_fit(self, request: Request) -> bool:
        """Can the prompt be more than the model's context holds? A token is a byte at least."""
        info = self.catalogue.info(request.model)
        return info is not None and 0 < info.context_length <= _most_tokens(request)

    async def _first_event(self, following: Following) -> Event | None:
        """If it comes soon; one that may be a refusal is waited for longer."""
        first = await following.peek(self.config.hold)
        if first is None and self._may_not_fit(following.job.request):
            first = await self._long_peek(following)
        return first

    async def _long_peek(self, following: Following) -> Event | None:
        draining = asyncio.create_task(self._draining.wait())
        peeking = asyncio.create_task(following.peek(self.config.hold_long_prompt))
        try:
            await asyncio.wait([draining, peeking], return_when=asyncio.FIRST_COMPLETED)
            return await peeking if peeking.done() else None
        finally:
            draining.cancel()
            peeking.cancel()

    async def ask(
        self, request: Request, submission: Submission, gone: Callable[[], Awaitable[None]]
    ) -> tuple[Job, Completion]:
        """Submit and `fold`, for an answer that nobody comes back for: its job is dropped, whatever becomes of it."""
        job = await self.submit(request, msgspec.structs.replace(submission, keep=ASK_KEEP))
        try:
            return job, await self.fold(job, gone)
        finally:
            with contextlib.suppress(BrokerUnavailable):  # then it is dropped a little later
                await self.broker.forget(job.tenant, job.id)

    async def fold(self, job: Job, gone: Callable[[], Awaitable[None]]) -> Completion:
        """Wait for a job's end and fold its log; *gone* returns when the client has left. Raises the job's error."""
        following = self.follow(job)
        leaving = asyncio.ensure_future(gone())
        over = asyncio.create_task(self._over.wait())
        folding = asyncio.create_task(_collect(following))
        try:
            await asyncio.wait([leaving, over, folding], return_when=asyncio.FIRST_COMPLETED)
            if not folding.done():
                if over.done():
                    raise BrokerUnavailable(
                        "The server is shutting down; the job goes on. Ask again with the same idempotency key.",
                        retry_after=2.0,
                    )
                raise InvalidRequest("The client left before the reply was complete.")
            completion = fold(folding.result(), job.request.n)
        finally:
            complete = folding.done()
            leaving.cancel()
            over.cancel()
            folding.cancel()
            await asyncio.gather(folding, return_exceptions=True)
            await following.close(complete)
        ended = completion.ended
        assert ended is not None
        if ended.error is not None:
            raise error_from_info(ended.error)
        return completion


def _most_tokens(request: Request) -> int:
    """What the prompt of *request* can have of tokens, but for those of a chat template."""
    if request.prompt_ids is not None:
        return len(request.prompt_ids)
    texts = [request.prompt or ""]
    for message in request.messages or ():
        texts += [message.content, *(call.arguments for call in message.tool_calls)]
    tools = len(msgspec.json.encode(request.tools)) if request.tools else 0
    return tools + sum(len(text.encode(errors="replace")) for text in texts)


async def _collect(following: Following) -> list[Event]:
    return [event async for event in following]
