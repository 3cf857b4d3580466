"""The upstream engine: requests go to OpenAI-compatible servers, and come back as tokens of the log."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import aiohttp
import msgspec

from penstock.core.aio import merge
from penstock.core.errors import (
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    PenstockError,
    RequestTooLarge,
    Unsupported,
)
from penstock.core.events import Logprob, Prefix
from penstock.core.foreign import Malformed, decode
from penstock.core.job import Request, Task
from penstock.core.ports import Finish, ModelInfo, Output
from penstock.core.tasks import Tokenized
from penstock.engines.child.backend import tokenized_output
from penstock.engines.child.output_queue import AsyncBackend
from penstock.engines.frames import Progress
from penstock.engines.upstream.answers import (
    DetokenizeAnswer,
    TemplateAnswer,
    TokenizeAnswer,
    detokenize_body,
    embedding_body,
    pieces_body,
    read,
    read_pieces,
    read_scores,
    read_vectors,
    score_body,
    template_body,
    tokenize_body,
)
from penstock.engines.upstream.dialects import Resume, ServerDialect, UpstreamError, body, endpoint
from penstock.engines.upstream.options import TASKS, UpstreamOptions, addresses
from penstock.engines.upstream.replicas import (
    MAX_RESULT,
    Broken,
    Faults,
    Replica,
    Replicas,
    Tries,
    Unable,
    read_answer,
    reason,
)
from penstock.engines.upstream.reply import Diverged, UpstreamReply
from penstock.engines.upstream.stream import Lines, StreamError

T = TypeVar("T")

#: Context length where neither the servers nor the operator tell one. It only bounds what is refused before it is sent.
DEFAULT_CONTEXT = 131_072
#: A pause that a server asks for is kept up to so many seconds; longer ones are the queue's.
MAX_RETRY_AFTER = 30.0
NEW_LIMIT = "max_completion_tokens"
#: Seconds for a connection that has told everything to end properly, so that it can be used again.
LINGER = 1.0
#: Calls at once for the inputs of one request: several replicas share it, and one has the next call when it answers.
ABREAST = 4


class UpstreamBackend(AsyncBackend):
    def __init__(self, name: str, path: str | None, options: UpstreamOptions, progress: Progress) -> None:
        replicas = [Replica(address) for address in addresses(path)]
        self._options = options
        super().__init__()
        self.slots = options.slots
        try:
            self.run(self._connect(name, replicas, progress))
        except BaseException:
            super().close()
            raise
        up = [each for each in replicas if each.dialect is not None]
        cards = [each.card for each in up if each.card is not None]
        self._dialects = {each.dialect for each in up if each.dialect is not None}
        unsupported = {field for dialect in self._dialects for field in dialect.unsupported}
        self.info = ModelInfo(
            name=name,
            engine="upstream",
            context_length=options.context or min((c.context for c in cards if c.context), default=DEFAULT_CONTEXT),
            precision=next((card.precision for card in cards), ""),
            vocab_size=min((card.vocab_size for card in cards if card.vocab_size), default=0),
            chat=all(card.chat for card in cards),
            unsupported=tuple(sorted(unsupported.union(*(card.unsupported for card in cards)))),
            tasks=tuple(task for task in TASKS if self._replicas.able(task)),
            dimensions=next((each.dimensions for each in up if each.dimensions), 0),
        )
        self._dimensions = self.info.dimensions
        for each in replicas:
            each.on_change = self._look
        self.run(self._watch())

    def _look(self) -> None:
        """A replica went down, or came up."""
        self.report_away("" if self._replicas.up else "no upstream server answers")

    async def _watch(self) -> None:
        self._look()  # one may have gone since it was asked
        self._watching = self.loop.create_task(self._replicas.watch())

    async def _connect(self, name: str, replicas: list[Replica], progress: Progress) -> None:
        options = self._options
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=options.connect_timeout, sock_read=options.idle_timeout
            ),
            headers={"Authorization": f"Bearer {secret}"} if (secret := options.secret) else {},
            cookie_jar=aiohttp.DummyCookieJar(),
            json_serialize=lambda value: msgspec.json.encode(value).decode(),
            read_bufsize=1 << 18,
            trust_env=False,
        )
        self._replicas = Replicas(replicas, self._session, name, options)
        try:
            await self._replicas.load(lambda what: progress(what, None))
        except BaseException:
            await self._session.close()
            raise

    def close(self) -> None:
        async def disconnect() -> None:
            self._watching.cancel()
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(self._watching, *self._tasks.values(), return_exceptions=True)
            await self._session.close()

        self.run(disconnect())
        super().close()

    # ------------------------------------------------------------------------------------ AsyncBackend

    def check(self, request: Request) -> None:
        match request.task:
            case "embed":
                self._check_inputs(request)
            case "tokenize":
                self._check_ids(request)
            case _:
                self._check_prompt(request)

    def _check_prompt(self, request: Request) -> None:
        room = self.info.context_length - (request.task == "generate")
        if request.prompt_ids is not None and len(request.prompt_ids) > room:
            raise ContextLengthExceeded.of("prompt", len(request.prompt_ids), self.info.context_length)
        if request.response_format is not None and request.messages is None:
            self._refuse({"openai"}, "follow a response_format without messages", "response_format")
        if request.continue_final and self._options.continuation != "text":
            self._refuse({"openai"}, "continue a final message", "continue_final_message")

    def _check_inputs(self, request: Request) -> None:
        for index, ids in enumerate(request.inputs or ()):
            if not isinstance(ids, str) and len(ids) > self.info.context_length:
                raise ContextLengthExceeded.of("input", len(ids), self.info.context_length, index=index)

    def _check_ids(self, request: Request) -> None:
        """llama.cpp stumbles over ids that it does not have; it says how many it has."""
        last = self.info.vocab_size - 1
        if last > 0 and request.prompt_ids and not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) <= last:
            raise InvalidRequest(f"Token ids must be in 0 … {last}.", param="tokens")

    def _refuse(self, kinds: set[str], what: str, param: str) -> None:
        """Raise `Unsupported` where a replica is of one of *kinds*."""
        for dialect in self._dialects:
            if dialect.name in kinds:
                raise Unsupported(f"The upstream server, of the kind {dialect.name!r}, does not {what}.", param=param)

    def generate(self, key: int, request: Request, prefixes: list[Prefix]) -> AsyncIterator[Output]:
        match request.task:
            case "embed":
                return self._embed(key, request, prefixes[0])
            case "tokenize":
                return self._tokenize(key, request)
            case "score":
                return self._score(key, request, prefixes[0])
            case _:
                return self._reply(key, request, prefixes)

    async def _reply(self, key: int, request: Request, prefixes: list[Prefix]) -> AsyncGenerator[Output]:
        alone = len(prefixes) == 1
        replies = [
            UpstreamReply(key, None if alone else choice, prefix, request) for choice, prefix in enumerate(prefixes)
        ]
        known: int | None = None
        if request.prompt_ids is not None:
            known = len(request.prompt_ids)  # known at once; others learn it with the first token, or with the last
            for reply in replies:
                reply.prompt_tokens = known
        # Where no server tells, or the connection broke between a reply's end and its usage.
        guess = request.estimated_prompt_tokens
        counted = ended = False
        faults = Faults(len(replies))
        streams = [
            self._run(request, choice, reply, faults) for choice, reply in enumerate(replies) if reply.finish is None
        ]
        async with contextlib.aclosing(streams[0] if len(streams) == 1 else merge(streams)) as outputs:
            async for output in outputs:
                if counted:  # with another choice, which shares the prompt
                    output.prompt_tokens, output.cached_tokens = None, 0
                else:
                    output.prompt_tokens = output.prompt_tokens or known
                if alone and replies[0].finish is not None:
                    output.finish, ended = _finish(replies), True
                    if not counted and output.prompt_tokens is None:
                        output.prompt_tokens = guess
                counted = counted or output.prompt_tokens is not None
                yield output
        if not ended:
            yield Output(key, prompt_tokens=None if counted else guess, finish=_finish(replies))

    # ------------------------------------------------------------------------------------ one choice

    async def _run(self, request: Request, choice: int, reply: UpstreamReply, faults: Faults) -> AsyncGenerator[Output]:
        """Call until the reply has ended, on one replica after another."""
        tries = Tries(self._replicas, "generate", faults)
        if reply.ids and request.response_format is not None and _is_json(reply.text):
            reply.finish = "stop"  # only its end was not told
        while reply.finish is None:
            replica = await tries.next()
            before = len(reply.ids)
            with tries.on(replica):
                async with contextlib.aclosing(self._call(replica, request, choice, reply)) as outputs:
                    async for output in outputs:
                        yield output
            if reply.finish is None:  # it broke
                if len(reply.ids) > before:
                    tries.progressed()
                if len(reply.ids) >= reply.limit:
                    reply.finish = "length"

    async def _call(
        self, replica: Replica, request: Request, choice: int, reply: UpstreamReply
    ) -> AsyncGenerator[Output]:
        """One call to one replica. Raises `Broken`, `Unable`, or what refuses the request."""
        dialect = replica.dialect
        assert dialect is not None
        resume = self._resume(dialect, request, reply)
        sent = body(dialect, replica.model, self.info.context_length, request, choice, reply, resume)
        if "messages" in sent:
            sent[replica.limit_field] = sent.pop("max_tokens")
        reply.begin(again=resume == "again", prompt=resume in ("ids", "text"))
        cut = False
        with self._hearing():
            while True:
                async with self._session.post(
                    replica.address.api + endpoint(sent), json=sent, allow_redirects=False
                ) as response:
                    if response.status == 200:
                        async for output in self._read(replica, response, reply):
                            yield output
                        return
                    refusal = await self._refused(replica, response)
                    if NEW_LIMIT in refusal.message and "messages" in sent and "max_tokens" in sent:
                        replica.limit_field = NEW_LIMIT
                        sent[NEW_LIMIT] = sent.pop("max_tokens")
                        continue
                    if refusal.about_limit and not cut and dialect.name in ("vllm", "openai"):
                        # The prompt may fit, and only what was asked for not: then it gets what room there is.
                        cut = True
                        if "messages" in sent:
                            del sent[replica.limit_field]  # a chat has it by itself
                            continue
                        room = self.info.context_length - await self._prompt_tokens(replica, sent["prompt"])
                        if 0 < room < sent["max_tokens"]:
                            sent["max_tokens"] = room
                            continue
                    raise refusal.refusal(replica.model)

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[None]:
        """Around a call: what its failures are."""
        try:
            yield
        except TimeoutError:
            raise Broken(f"silent for {self._options.idle_timeout:.0f} s") from None
        except aiohttp.ClientError as error:
            raise Broken(reason(error), lost=isinstance(error, aiohttp.ClientConnectorError)) from None
        except StreamError as error:
            raise Broken(f"it sent {error}", garbled=True) from None
        except Diverged:
            raise _lost("asked again, it says something else") from None

    async def _prompt_tokens(self, replica: Replica, prompt: str | list[int]) -> int:
        """How many there are, as far as it can be found out: else as many as there is room for."""
        if isinstance(prompt, list):
            return len(prompt)
        with contextlib.suppress(Broken, Unable, StreamError, PenstockError):
            sent = {"model": replica.model, "prompt": prompt}
            return read(await self._ask(replica, f"{replica.address.root}/tokenize", sent), TokenizeAnswer).count
        return self.info.context_length

    async def _read(
        self, replica: Replica, response: aiohttp.ClientResponse, reply: UpstreamReply
    ) -> AsyncGenerator[Output]:
        """The answer to a call: an output for everything that was ready, however many chunks it came in."""
        heard = over = False
        try:
            async with contextlib.aclosing(_events(response)) as events:
                async for payloads in events:
                    output, error, over = reply.take(payloads)
                    if over and reply.ended:
                        output.extend(reply.end())
                    if output.ids or output.prompt_tokens is not None or over:
                        if not heard:
                            heard = True
                            replica.succeeded()
                        yield output
                    if isinstance(error, StreamError):
                        raise error
                    if error is not None:
                        raise self._failure(UpstreamError.read(error), replica)
                    if over:
                        break
        except (TimeoutError, aiohttp.ClientError, StreamError):
            if not reply.ended:  # else the reply is complete, whatever became of what comes behind it
                raise
        if not reply.ended:
            raise StreamError("an end without a reason") if over else Broken("the stream broke off")
        if reply.finish is None:
            yield reply.end()
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(LINGER):
                while not response.content.at_eof() and await response.content.readany():
                    pass

    # ------------------------------------------------------------------------------------ continuation

    def _resume(self, dialect: ServerDialect, request: Request, reply: UpstreamReply) -> Resume:
        """How a reply that has begun goes on. Raises `EngineError` where it must not."""
        if not reply.ids:
            return "anew"
        continuation = self._options.continuation
        # Ids say all that a server has to know: but not which of them it took for the beginning of a call or of a stop
        # string. And one without text may be the beginning of a character: better to go on before it.
        prompt_known = request.prompt_ids is not None or (reply.prompt_ids is not None and reply.texts[-1] != "")
        written = request.messages is None or (bool(reply.text) and not request.callable_tools)
        free = request.form is None and not request.sampling.stop
        if prompt_known and written and free and not reply.has_unknown_ids and continuation in ("auto", "ids"):
            return "ids"
        if not any(reply.texts):  # nobody has seen anything of it
            return "anew"
        if continuation in ("none", "ids"):
            raise _lost("the option continuation forbids it")
        if (
            reply.thought  # which a template may leave out
            or request.form is not None  # whose grammar would begin anew
            or (request.tools and dialect.name == "penstock")
            or (request.messages is not None and not dialect.begun_chat and continuation != "text")
            or (request.prompt_ids is not None and dialect.name != "llama")
        ):
            return "again"
        return "text"

    # ------------------------------------------------------------------------------------ calls with one answer

    async def _answered(self, task: Task, ask: Callable[[Replica], Awaitable[T]]) -> T:
        """What *ask* gets from one replica or another."""
        tries = Tries(self._replicas, task)
        while True:
            replica = await tries.next()
            with tries.on(replica):
                return await ask(replica)

    async def _ask(self, replica: Replica, url: str, sent: dict[str, Any]) -> bytes:
        """The answer to one call. Raises `Broken`, `Unable`, or what refuses the request."""
        with self._hearing():
            async with self._session.post(url, json=sent, allow_redirects=False) as response:
                if response.status != 200:
                    raise (await self._refused(replica, response)).refusal(replica.model)
                answer = await read_answer(response, MAX_RESULT)
        replica.succeeded()
        return answer

    async def _embed(self, key: int, request: Request, prefix: Prefix) -> AsyncGenerator[Output]:
        """The inputs in calls of so many as the option batch says; what has come of them is in the log at once."""
        inputs, logged = request.inputs or (), set(prefix.ids)
        left = [index for index in range(len(inputs)) if index not in logged]
        calls: deque[list[int]] = deque()
        for kind in (str, tuple):  # most servers take no mixture
            some = [index for index in left if isinstance(inputs[index], kind)]
            calls.extend(some[at : at + self._options.batch] for at in range(0, len(some), self._options.batch))
        tokens = 0
        streams = [self._embed_some(key, request, calls) for _ in range(min(ABREAST, len(calls)))]
        async with contextlib.aclosing(merge(streams)) as outputs:
            async for output in outputs:
                tokens += output.prompt_tokens or 0
                output.prompt_tokens = None  # told once, of all
                yield output
        if logged:  # by an earlier attempt, that told nobody: as many as their length says beside the others
            tokens += round(_guess(request, sorted(logged)) * (tokens / _guess(request, left) if left else 1))
        yield Output(key, prompt_tokens=tokens, finish=Finish(("stop",)))

    async def _embed_some(self, key: int, request: Request, calls: deque[list[int]]) -> AsyncGenerator[Output]:
        """Take from *calls* (the inputs' indexes of each) until none is left."""
        while calls:
            indexes = calls.popleft()
            try:
                yield await self._answered("embed", partial(self._vectors, key=key, request=request, indexes=indexes))
            except RequestTooLarge:
                if len(indexes) == 1:
                    raise
                half = len(indexes) // 2
                calls.extendleft((indexes[half:], indexes[:half]))
            except InvalidRequest as error:
                error.param = error.param or "input"
                if len(indexes) < len(request.inputs or ()) and not isinstance(
                    error, Unsupported
                ):  # it may name an input, by its place in the call
                    error.message += f" (This was said of the inputs {indexes[0]} to {indexes[-1]}, counted from 0.)"
                raise

    async def _vectors(self, replica: Replica, *, key: int, request: Request, indexes: list[int]) -> Output:
        """The vectors of the inputs at *indexes*; ``prompt_tokens``: of these inputs."""
        sent = embedding_body(replica.model, request, indexes, floats=replica.floats)
        try:
            answer = await self._ask(replica, f"{replica.address.api}/embeddings", sent)
        except InvalidRequest as error:
            if replica.floats or "encoding_format" not in f"{error.param} {error.message}":
                raise
            replica.floats = True
            return await self._vectors(replica, key=key, request=request, indexes=indexes)
        with self._hearing():
            texts, size, tokens = read_vectors(answer, len(indexes))
        if request.dimensions is None:
            self._dimensions = self._dimensions or size
            if size != self._dimensions:
                raise Broken(f"it has vectors of {size} dimensions, others of {self._dimensions}")
        elif size != request.dimensions:
            raise Unsupported(
                f"The upstream server gives vectors of {size} dimensions, whatever is asked for.", param="dimensions"
            )
        return Output(key, list(indexes), texts, prompt_tokens=_guess(request, indexes) if tokens is None else tokens)

    async def _tokenize(self, key: int, request: Request) -> AsyncGenerator[Output]:
        found = await self._answered("tokenize", partial(self._tokens, request=request))
        yield tokenized_output(key, found)

    async def _score(self, key: int, request: Request, prefix: Prefix) -> AsyncGenerator[Output]:
        """All in one output, behind what is logged of it."""
        ids, texts, entries = await self._answered("score", partial(self._scores, request=request))
        had = len(prefix.ids)
        yield Output(key, ids[had:], texts[had:], None, entries[had:], len(ids), Finish(("stop",)))

    async def _scores(self, replica: Replica, *, request: Request) -> tuple[list[int], list[str], list[Logprob | None]]:
        dialect, model = replica.dialect, replica.model
        assert dialect is not None
        with self._hearing():
            sent = score_body(dialect, model, request)
            scored = read_scores(await self._ask(replica, f"{replica.address.api}/completions", sent))
            if (ids := scored.ids or list(request.prompt_ids or ())) == []:
                asked = tokenize_body(dialect, model, request)
                ids = read(await self._ask(replica, f"{replica.address.root}/tokenize", asked), TokenizeAnswer).tokens
            reported, entries = scored.entries(ids, request.sampling.logprobs or 0)
        texts = [text or "" for text in reported]
        if reported[0] is None:  # vLLM tells nothing of the first; but what all of them make is known
            text = request.prompt
            if text is None:
                text = (await self._tokens(replica, request=msgspec.structs.replace(request, task="tokenize"))).text
            texts[0] = text.removesuffix("".join(texts[1:]))
            if texts[0] == text and len(texts) > 1:
                texts[0] = ""  # its tokens are written in another way
        return ids, texts, entries

    async def _tokens(self, replica: Replica, *, request: Request) -> Tokenized:
        dialect, root, model = replica.dialect, replica.address.root, replica.model
        assert dialect is not None
        with self._hearing():
            if dialect.name == "llama":
                prompt = None
                if request.messages is not None:
                    answer = await self._ask(replica, f"{root}/apply-template", template_body(dialect, model, request))
                    prompt = read(answer, TemplateAnswer).prompt
                return read_pieces(await self._ask(replica, f"{root}/tokenize", pieces_body(model, request, prompt)))
            ids, names = list(request.prompt_ids or ()), None
            if request.prompt_ids is None:
                found = read(
                    await self._ask(replica, f"{root}/tokenize", tokenize_body(dialect, model, request)), TokenizeAnswer
                )
                ids, names = found.tokens, found.token_strs
            text = DetokenizeAnswer(prompt="")
            if ids:
                text = read(
                    await self._ask(replica, f"{root}/detokenize", detokenize_body(dialect, model, ids)),
                    DetokenizeAnswer,
                )
        return Tokenized(ids, names, text.prompt or text.text or "")

    # ------------------------------------------------------------------------------------ what servers answer

    async def _refused(self, replica: Replica, response: aiohttp.ClientResponse) -> UpstreamError:
        """What a refusal says, if it is for the client. Raises `Broken`, `Unable` and `EngineError` if not."""
        status = response.status
        if status in (401, 403):
            raise EngineError(
                f"The upstream server refuses Penstock's key (HTTP {status}). Its operator has to set it."
            )
        if status < 400:
            raise EngineError(f"The upstream server answers HTTP {status} where a reply is due. Its address is wrong.")
        answer = await read_answer(response)
        try:
            value = decode(answer, object)
        except Malformed:
            value = answer.decode("utf-8", "replace")
        reported = UpstreamError.read(value)
        message = self._replicas.for_clients(reported.message)
        reported = UpstreamError(message, reported.kind, status, reported.param)
        if reported.about_route:
            raise Unable(f"HTTP {status}: {message}")
        if status == 429 or (status == 503 and "Retry-After" in response.headers):
            raise Broken(f"HTTP {status}: {message}", retry_after=_seconds(response.headers.get("Retry-After")))
        if (status >= 500 and not reported.about_batch) or status in (408, 409, 425):
            raise Broken(f"HTTP {status}: {message}")
        return reported

    def _failure(self, reported: UpstreamError, replica: Replica) -> Exception:
        """An error in the middle of a stream."""
        reported = UpstreamError(
            self._replicas.for_clients(reported.message), reported.kind, reported.status, reported.param
        )
        if "poisoned" in reported.kind:
            return EngineError(reported.message)
        if reported.about_context or 400 <= reported.status < 500 or "invalid_request" in reported.kind:
            return reported.refusal(replica.model)
        return Broken(reported.message)


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[list[bytes]]:
    """The data of a stream's events, those together that came together; a reply that is one JSON is one of them."""
    lines = Lines()
    begun = False
    while data := await response.content.readany():
        if not begun and not data.isspace():
            begun = True
            if data.lstrip().startswith(b"{"):
                yield [data + await read_answer(response, MAX_RESULT), b"[DONE]"]
                return
        if payloads := lines.feed(data):
            yield payloads


def _is_json(text: str) -> bool:
    try:
        decode(text, msgspec.Raw)
    except Malformed:
        return False
    return True


def _finish(replies: list[UpstreamReply]) -> Finish:
    return Finish.of((reply.finish or "stop", reply.stop) for reply in replies)


def _guess(request: Request, indexes: list[int]) -> int:
    """About how many tokens the inputs at *indexes* have."""
    inputs = request.inputs or ()
    return msgspec.structs.replace(request, inputs=tuple(inputs[i] for i in indexes)).estimated_prompt_tokens


def _lost(why: str) -> EngineError:
    return EngineError(f"The reply was interrupted, and its upstream server cannot continue it: {why}.")


def _seconds(header: str | None) -> float:
    """``Retry-After`` in seconds (a date, or none: one second)."""
    try:
        return min(MAX_RETRY_AFTER, max(0.0, float(header or 1)))
    except ValueError:
        return 1.0


def load(name: str, path: str | None, options: UpstreamOptions, progress: Progress) -> UpstreamBackend:
    """See `penstock.engines.child.backend.Loader`."""
    return UpstreamBackend(name, path, options, progress)
