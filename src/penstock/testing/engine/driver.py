"""An engine driven by hand: leases to give it, and what came out of it, checked as it comes."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterable
from typing import Any, Literal

import pytest

from penstock.core.events import Completion, Ended, Logprob, Phase, TokenPhase, Tokens, fold
from penstock.core.job import Job, Message, Request, ResponseFormat, Sampling, Status, Task, Tool, ToolCall, Usage
from penstock.core.ports import Engine, Finish, Lease, Output
from penstock.core.tasks import Tokenized, vector_values, vectors

#: No test may wait longer than this for one engine step.
STEP_TIMEOUT = 60.0


def lease(
    engine: Engine,
    prompt: str = "Once upon a time",
    *,
    n: int = 1,
    messages: tuple[Message, ...] | None = None,
    prompt_ids: tuple[int, ...] | None = None,
    prefix: Iterable[int] = (),
    texts: Iterable[str] | None = None,
    choices: list[int] | None = None,
    phases: list[TokenPhase] | None = None,
    attempt: int = 1,
    response_format: ResponseFormat | None = None,
    tools: tuple[Tool, ...] = (),
    tool_choice: Literal["auto", "none", "required"] = "auto",
    tool_name: str | None = None,
    **sampling: Any,
) -> Lease:
    """A lease of a greedy 24-token request unless *sampling* says otherwise."""
    values: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, **sampling}
    request = Request(
        model=engine.models[0].name,
        prompt=prompt if messages is None and prompt_ids is None else None,
        prompt_ids=prompt_ids,
        messages=messages,
        sampling=Sampling(**values),
        n=n,
        response_format=response_format,
        tools=tools,
        tool_choice=tool_choice,
        tool_name=tool_name,
    )
    ids = list(prefix)
    logged = [""] * len(ids) if texts is None else list(texts)
    return Lease(Job(id="job", tenant="t", request=request), attempt, ids, logged, choices, phases)


def task_lease(
    engine: Engine,
    task: Task,
    *,
    prefix: Iterable[int] = (),
    texts: Iterable[str] = (),
    attempt: int = 1,
    **fields: Any,
) -> Lease:
    """A lease of a request for something else than a reply; *fields* are those of `Request`."""
    request = Request(model=engine.models[0].name, task=task, **fields)
    return Lease(Job(id="job", tenant="t", request=request), attempt, list(prefix), list(texts))


#: Fields that an engine may not be able to honour, and something to ask of each.
FIELDS: dict[str, Any] = {
    "seed": 1,
    "stop": ("x",),
    "logit_bias": {7: 1.0},
    "logprobs": 1,
    "response_format": ResponseFormat("json_object"),
    "min_tokens": 1,
    "stop_token_ids": (7,),
    "bad_words": ("x",),
}

#: A past call whose arguments write half a character, as a reply has it that was cut there.
HALF = (
    Message("user", "Which way?"),
    Message("assistant", "", (ToolCall("call_1", "look", r'{"where": "up \ud83d"}'),)),
    Message("tool", "Nothing there.", (), "call_1"),
    Message("user", "Look again."),
)


#: Small, so that a model that knows nothing of JSON comes to its end.
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}


def guided_lease(engine: Engine, **fields: Any) -> Lease:
    """A lease of a request whose reply must obey `PERSON`."""
    defaults: dict[str, Any] = {"max_tokens": 200, "response_format": ResponseFormat("json_schema", PERSON)}
    return lease(engine, **{**defaults, **fields})


def assert_obeys(text: str) -> None:
    """*text* is what `PERSON` describes."""
    value = json.loads(text)
    assert set(value) == {"name", "tags", "age"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 8
    assert value["tags"] in (["a"], ["b"], ["a", "a"], ["a", "b"], ["b", "a"], ["b", "b"])
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 150


def score_lease(engine: Engine, count: int, **fields: Any) -> Lease:
    """A lease of a prompt to score, with *count* alternatives."""
    return task_lease(engine, "score", sampling=Sampling(logprobs=count), **fields)


class Result:
    """What came out under one key."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.outputs: list[Output] = []
        self.finish: Finish | None = None

    @property
    def ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.ids]

    @property
    def texts(self) -> list[str]:
        return [text for output in self.outputs for text in output.texts]

    @property
    def choices(self) -> list[int]:
        return [c for output in self.outputs for c in (output.choices or [0] * len(output.ids))]

    @property
    def phases(self) -> list[TokenPhase]:
        return [phase for output in self.outputs for phase in output.phases or [Phase.TEXT] * len(output.ids)]

    @property
    def prompt_counts(self) -> list[int]:
        return [output.prompt_tokens for output in self.outputs if output.prompt_tokens is not None]

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, as told with its count."""
        told = {
            output.prompt_tokens is not None: output.cached_tokens for output in self.outputs if output.cached_tokens
        }
        assert False not in told, "what was cached is told with the prompt's count"
        return told.get(True, 0)

    @property
    def text(self) -> str:
        return self.folded.texts[0]

    @property
    def tokenized(self) -> Tokenized:
        """Of a request to tokenize."""
        assert self.finish == Finish(("stop",)), self.finish
        assert self.ids == [0]
        return Tokenized.of(self.folded)

    @property
    def vectors(self) -> list[list[float]]:
        """Of a request to embed, in the order of the inputs."""
        assert self.finish == Finish(("stop",)), self.finish
        return [vector_values(text) for text in vectors(self.folded)]

    def vector_of(self, index: int) -> list[float]:
        return vector_values(self.texts[self.ids.index(index)])

    @property
    def scores(self) -> list[Logprob | None]:
        return [each for output in self.outputs for each in output.logprobs or [None] * len(output.ids)]

    @property
    def folded(self) -> Completion:
        events: list[Tokens | Ended] = []
        position = 1
        for output in self.outputs:
            events.append(Tokens(position, 1, output.ids, output.texts, output.choices, output.logprobs, output.phases))
            position += len(output.ids)
        events.append(Ended(position, 1, Status.COMPLETED, (), Usage()))
        return fold(events, self.n)


_keys = itertools.count(1)


class Driver:
    """Adds leases to an engine and collects their outputs, checking what must hold for every output."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.results: dict[int, Result] = {}
        self.aborted: set[int] = set()

    def add(self, lease: Lease) -> int:
        key = next(_keys)
        self.results[key] = Result(lease.job.request.n)
        self.engine.add(key, lease)
        return key

    def abort(self, key: int) -> None:
        self.aborted.add(key)
        self.engine.abort(key)

    async def step(self) -> None:
        async with asyncio.timeout(STEP_TIMEOUT):
            outputs = await self.engine.step()
        for output in outputs:
            if output.key not in self.results:
                assert output.key < min(self.results), "a key that nobody added"
                continue  # the last of what an earlier test aborted, where tests share an engine
            result = self.results[output.key]
            assert result.finish is None, "an output after the end"
            assert len(output.ids) == len(output.texts)
            result.outputs.append(output)
            result.finish = output.finish
            if result.finish is not None and result.ids and result.finish.error is None:
                # With the first output wherever it is known then; some servers tell it with the last.
                assert len(result.prompt_counts) == 1, "the prompt must be counted, once"
                [prompt_tokens] = result.prompt_counts
                assert 0 <= result.cached_tokens <= prompt_tokens, "more is cached than the prompt has"

    async def finish(self, *keys: int) -> list[Result]:
        """Step until *keys* (default: all that were not aborted) have ended."""
        wanted = keys or tuple(key for key in self.results if key not in self.aborted)
        while any(self.results[key].finish is None for key in wanted):
            await self.step()
        return [self.results[key] for key in wanted]


async def run(engine: Engine, *leases: Lease) -> list[Result]:
    driver = Driver(engine)
    keys = [driver.add(lease) for lease in leases]
    return await driver.finish(*keys)


async def forever(engine: Engine) -> None:
    """Step until the engine is gone."""
    async with asyncio.timeout(STEP_TIMEOUT):
        while True:
            await engine.step()


def entries_of(result: Result) -> list[Logprob]:
    """The log-probabilities of a reply, one a token."""
    return [entry for output in result.outputs for entry in output.logprobs or () if entry is not None]


def spelled(entries: Iterable[Logprob]) -> str:
    """The text that tokens make by themselves."""
    return b"".join(entry.data or (entry.text or "").encode() for entry in entries).decode(errors="replace")


def needs_determinism(engine: Engine) -> None:
    if not engine.models[0].deterministic:
        pytest.skip("this engine does not promise determinism")


def needs_task(engine: Engine, task: Task) -> None:
    if task not in engine.models[0].tasks:
        pytest.skip(f"this engine does not {task}")


def needs(engine: Engine, *fields: str) -> None:
    missing = set(fields) & set(engine.models[0].unsupported)
    if missing:
        pytest.skip(f"this engine does not honour {', '.join(sorted(missing))}")


PROMPTS = [
    "Once upon a time",
    "The little fox ran",
    "One day a girl found",
    "Rain",
    "In a house by the sea there lived an old man who",
    "What is the colour of the sky?",
    "My friend said",
    "There was a bell in the tower and",
]


#: Of different lengths, as they are in life.
INPUTS = (
    "Once upon a time",
    "In a house by the sea there lived an old man who had a boat and a dog",
    "rain",
    "The little fox ran to the river",
    "x",
)


class Contract:
    """The base of every part of the suite: what the tests may ask of an engine. Override what yours cannot."""

    vector_tolerance = 1e-4
    """How far two components of one vector may be apart: the last bits of float32 differ in batches of other sizes."""
    tells_stops = True
    """False for an engine over somebody else's server that does not say which stop string ended a reply."""
    tells_bytes = True
    """False for an engine over somebody else's server that has only texts for the tokens of a log-probability."""
