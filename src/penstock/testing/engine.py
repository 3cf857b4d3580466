"""The engine contract: what every engine promises, as a suite that a third party can run against its own.

Subclass `EngineContract` in a test module and give it a fixture ``engine`` that yields a started engine::

    class TestMine(EngineContract):
        @pytest.fixture
        async def engine(self):
            engine = EngineProcess(EngineSpec("mine", "small"))
            await engine.start()
            yield engine
            await engine.close()

An engine that is slow to start may be shared by the tests of the class (a fixture of that scope, on a loop of that
scope); some tests close it, so it has to be started where it is not running.

Promises that need a deterministic engine are skipped where `ModelInfo.deterministic` is false.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Iterable
from typing import Any, Literal

import pytest

from penstock.core.errors import EngineDied
from penstock.core.events import Completion, Ended, Logprob, Tokens, fold
from penstock.core.job import Job, Message, Request, ResponseFormat, Sampling, Status, Task, Tool, ToolCall, Usage
from penstock.core.ports import Engine, Finish, Lease, Output
from penstock.core.tasks import Tokenized, vector_values, vectors
from penstock.core.tools import parse_tool_calls

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
    return Lease(Job(id="job", tenant="t", request=request), attempt, ids, logged, choices)


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
    wish: dict[str, Any] = {"max_tokens": 200, "response_format": ResponseFormat("json_schema", PERSON)}
    return lease(engine, **{**wish, **fields})


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
    def prompt_counts(self) -> list[int]:
        return [output.prompt_tokens for output in self.outputs if output.prompt_tokens is not None]

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
            events.append(Tokens(position, 1, output.ids, output.texts, output.choices, output.logprobs))
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


class TaskContract:
    """What an engine promises of the tasks that it offers (`ModelInfo.tasks`): the suite of one that does not generate,
    and a part of `EngineContract`."""

    vector_tolerance = 1e-4
    """How far two components of one vector may be apart: the last bits of float32 differ in batches of other sizes."""

    def close_to(self, vectors: list[list[float]], others: list[list[float]]) -> bool:
        """Are they the same, but for that?"""
        most = self.vector_tolerance
        return all(
            len(ours) == len(theirs) and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < most
            for ours, theirs in zip(vectors, others, strict=True)
        )

    async def test_it_refuses_what_it_does_not_offer(self, engine: Engine) -> None:
        offered = engine.models[0].tasks
        asked: dict[Task, dict[str, Any]] = {
            "generate": {"prompt": "x"},
            "tokenize": {"prompt": "x"},
            "embed": {"inputs": ("x",)},
            "score": {"prompt": "x"},
        }
        missing = [task_lease(engine, task, **fields) for task, fields in asked.items() if task not in offered]
        for result in await run(engine, *missing) if missing else []:
            assert not result.ids
            assert result.finish is not None
            assert result.finish.error is not None
            assert (result.finish.error.code, result.finish.error.param) == ("unsupported", "model")

    # ------------------------------------------------------------------------------------ tokenize

    async def test_a_prompt_as_tokens_and_back(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        (result,) = await run(engine, task_lease(engine, "tokenize", prompt=PROMPTS[4]))
        found = result.tokenized
        assert found.token_strs is not None
        assert len(found.tokens) == len(found.token_strs) == result.prompt_counts[0] > 5
        assert all(found.token_strs)
        assert PROMPTS[4].lower() in found.text.lower()
        (back,) = await run(engine, task_lease(engine, "tokenize", prompt_ids=tuple(found.tokens)))
        assert (back.tokenized.tokens, back.tokenized.text) == (found.tokens, found.text)
        assert back.tokenized.token_strs in (found.token_strs, None)

    async def test_a_prompt_without_special_tokens(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        whole, bare = await run(
            engine,
            task_lease(engine, "tokenize", prompt="Rain"),
            task_lease(engine, "tokenize", prompt="Rain", add_special_tokens=False),
        )
        assert bare.tokenized.tokens
        assert set(bare.tokenized.tokens) <= set(whole.tokenized.tokens)

    async def test_nothing_has_no_tokens(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        (result,) = await run(engine, task_lease(engine, "tokenize", prompt_ids=()))
        assert result.tokenized.tokens == []
        assert result.tokenized.text == ""

    async def test_ids_that_the_model_does_not_have_are_refused(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        bad, good = await run(
            engine,
            task_lease(engine, "tokenize", prompt_ids=(5, 10_000_000)),
            task_lease(engine, "tokenize", prompt_ids=(5, 6)),
        )
        assert bad.finish is not None
        assert bad.finish.error is not None
        assert bad.finish.error.code == "invalid_request"
        assert good.tokenized.tokens == [5, 6]

    # ------------------------------------------------------------------------------------ embed

    async def test_every_input_has_a_vector(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        (result,) = await run(engine, task_lease(engine, "embed", inputs=INPUTS))
        assert sorted(result.ids) == list(range(len(INPUTS)))
        assert result.finish == Finish(("stop",))
        sizes = {len(vector) for vector in result.vectors}
        assert len(sizes) == 1
        assert sizes <= {engine.models[0].dimensions or next(iter(sizes))}
        assert not self.close_to(result.vectors[:1], result.vectors[1:2])

    async def test_a_vector_is_the_same_alone_and_among_others(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        alone = [(await run(engine, task_lease(engine, "embed", inputs=(each,))))[0] for each in INPUTS]
        first, second = await run(
            engine,
            task_lease(engine, "embed", inputs=INPUTS),
            task_lease(engine, "embed", inputs=tuple(reversed(INPUTS))),
        )
        wanted = [result.vectors[0] for result in alone]
        assert self.close_to(first.vectors, wanted)
        assert self.close_to(second.vectors, wanted[::-1])
        assert sum(result.prompt_counts[0] for result in alone) == first.prompt_counts[0] == second.prompt_counts[0]

    async def test_token_ids_are_embedded_as_their_text_is(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        needs_task(engine, "tokenize")
        (found,) = await run(engine, task_lease(engine, "tokenize", prompt=INPUTS[1]))
        (result,) = await run(engine, task_lease(engine, "embed", inputs=(INPUTS[1], tuple(found.tokenized.tokens))))
        assert self.close_to(result.vectors[:1], result.vectors[1:])

    async def test_an_embedding_goes_on_behind_what_is_logged(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        (whole,) = await run(engine, task_lease(engine, "embed", inputs=INPUTS))
        for cut in (1, len(INPUTS) - 1, len(INPUTS)):
            logged: dict[str, Any] = {"prefix": whole.ids[:cut], "texts": whole.texts[:cut], "attempt": 2}
            (rest,) = await run(engine, task_lease(engine, "embed", inputs=INPUTS, **logged))
            assert sorted(whole.ids[:cut] + rest.ids) == list(range(len(INPUTS)))
            assert rest.finish == Finish(("stop",))
            assert self.close_to(rest.vectors, [whole.vector_of(index) for index in sorted(rest.ids)])

    async def test_many_inputs_do_not_keep_one_waiting(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        driver = Driver(engine)
        many = driver.add(task_lease(engine, "embed", inputs=INPUTS * 300))
        one = driver.add(task_lease(engine, "embed", inputs=INPUTS[:1]))
        await driver.finish(one)
        assert driver.results[many].finish is None
        (result,) = await driver.finish(many)
        assert sorted(result.ids) == list(range(300 * len(INPUTS)))

    async def test_an_aborted_embedding_is_over(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        driver = Driver(engine)
        many = driver.add(task_lease(engine, "embed", inputs=INPUTS * 400))
        driver.abort(many)
        (result,) = await driver.finish(driver.add(task_lease(engine, "embed", inputs=INPUTS[:1])))
        assert result.ids == [0]
        assert len(driver.results[many].ids) < 400 * len(INPUTS)

    async def test_too_long_an_input_is_refused_and_disturbs_nobody(self, engine: Engine) -> None:
        needs_task(engine, "embed")
        context = engine.models[0].context_length
        bad, good = await run(
            engine,
            task_lease(engine, "embed", inputs=(INPUTS[0], tuple([7] * (context + 1)))),
            task_lease(engine, "embed", inputs=INPUTS[:1]),
        )
        assert bad.finish is not None
        assert bad.finish.error is not None
        assert (bad.finish.error.code, bad.finish.error.param) == ("context_length_exceeded", "input")
        assert str(context) in bad.finish.error.message
        assert good.ids == [0]


class EngineContract(TaskContract):
    guided_replies_resume = True
    """False for an engine over somebody else's server that has no way to go on inside a grammar."""
    tells_stops = True
    """False for an engine over somebody else's server that does not say which stop string ended a reply."""
    tells_bytes = True
    """False for an engine over somebody else's server that has only texts for the tokens of a log-probability."""

    # ------------------------------------------------------------------------------------ the shape of a reply

    async def test_it_says_what_it_serves(self, engine: Engine) -> None:
        (info,) = engine.models
        assert info.name
        assert info.engine
        assert info.context_length > 0
        assert engine.slots >= 1

    async def test_a_reply_has_max_tokens_tokens_and_one_end(self, engine: Engine) -> None:
        (result,) = await run(engine, lease(engine, max_tokens=10))
        assert len(result.ids) == 10
        assert result.finish == Finish(("length",))
        assert result.text

    async def test_the_prompt_is_counted_once(self, engine: Engine) -> None:
        (result,) = await run(engine, lease(engine, prompt_ids=(5, 6, 7, 8, 9)))
        assert result.prompt_counts == [5]

    async def test_a_single_token(self, engine: Engine) -> None:
        (result,) = await run(engine, lease(engine, max_tokens=1))
        assert len(result.ids) == 1
        assert result.finish == Finish(("length",))

    async def test_messages(self, engine: Engine) -> None:
        if not engine.models[0].chat:
            pytest.skip("no chat template")
        (result,) = await run(engine, lease(engine, messages=(Message("user", "Hello!"),), max_tokens=5))
        assert result.finish is not None
        assert result.finish.error is None

    async def test_n_choices_each_have_their_tokens(self, engine: Engine) -> None:
        needs(engine, "n")
        (result,) = await run(engine, lease(engine, n=3, max_tokens=7))
        assert [result.choices.count(choice) for choice in range(3)] == [7, 7, 7]
        assert result.finish == Finish(("length",) * 3)
        assert all(result.folded.texts)

    async def test_too_long_a_prompt_is_refused_and_disturbs_nobody(self, engine: Engine) -> None:
        context = engine.models[0].context_length
        good, bad = await run(engine, lease(engine), lease(engine, prompt_ids=tuple([7] * (context + 1))))
        assert bad.finish is not None
        assert bad.finish.error is not None
        assert bad.finish.error.code == "context_length_exceeded"
        assert str(context) in bad.finish.error.message
        assert len(good.ids) == 24

    @pytest.mark.parametrize("field", FIELDS)
    async def test_what_it_declares_unsupported_it_refuses(self, engine: Engine, field: str) -> None:
        """A job may have been accepted before anything was known of its model."""
        if field not in engine.models[0].unsupported:
            pytest.skip("this engine honours it")
        (result,) = await run(engine, lease(engine, **{field: FIELDS[field]}))
        assert result.finish is not None
        assert result.finish.error is not None
        assert (result.finish.error.code, result.finish.error.param) == ("unsupported", field)

    async def test_stop_strings_end_the_text_before_them(self, engine: Engine) -> None:
        needs(engine, "stop")
        needs_determinism(engine)
        (free,) = await run(engine, lease(engine, max_tokens=40))
        stop = free.text[15:19]
        (stopped,) = await run(engine, lease(engine, max_tokens=40, stop=("no such words", stop)))
        assert stopped.text == free.text[: free.text.index(stop)]
        assert stopped.finish == Finish(("stop",), stops=(stop,) if self.tells_stops else ())

    async def test_a_biased_token_is_drawn(self, engine: Engine) -> None:
        needs(engine, "logit_bias")
        (result,) = await run(engine, lease(engine, max_tokens=5, logit_bias={42: 100.0}))
        if set(result.ids) == {-1}:  # an engine that is not told ids, only texts
            assert len(result.texts) == 5
            assert len(set(result.texts)) == 1
        else:
            assert result.ids == [42] * 5

    async def test_logprobs_come_with_every_token(self, engine: Engine) -> None:
        needs(engine, "logprobs")
        (result,) = await run(engine, lease(engine, max_tokens=6, logprobs=3))
        logprobs = [entry for output in result.outputs for entry in output.logprobs or []]
        assert len(logprobs) == 6
        for token, entry in zip(result.ids, logprobs, strict=True):
            assert entry is not None
            assert entry.logprob <= 0
            assert len(entry.top) == 3
            assert entry.top[0].id == token, "greedy draws the likeliest"

    async def test_logprobs_are_of_the_tokens_themselves(self, engine: Engine) -> None:
        """Whatever a token added to the text: its entry has its own, and it is one of the alternatives."""
        needs(engine, "logprobs")
        settings: dict[str, Any] = {"max_tokens": 24, "temperature": 1.2, "seed": 5, "logprobs": 2}
        (free,) = await run(engine, lease(engine, **settings))
        stop = free.text[15:19]
        (stopped,) = await run(engine, lease(engine, stop=(stop,), **settings))
        for result in (free, stopped):
            entries = entries_of(result)
            assert len(entries) == len(result.ids)
            for id, entry in zip(result.ids, entries, strict=True):
                assert (id, entry.text, entry.logprob, entry.data) in [
                    (top.id, top.text, top.logprob, top.data) for top in entry.top
                ]
                assert 2 <= len(entry.top) <= 3
            own = spelled(entries)
            assert own.startswith(result.text)
            assert (stop in own[len(result.text) :]) == (result is stopped and stop in own)

    async def test_half_a_character_has_an_entry_of_its_own(self, engine: Engine) -> None:
        needs(engine, "logprobs", "logit_bias", "response_format")
        needs_task(engine, "tokenize")
        if not self.tells_bytes:
            pytest.skip("this engine is not told the tokens' bytes")
        (found,) = await run(engine, task_lease(engine, "tokenize", prompt="水", add_special_tokens=False))
        half = found.tokenized.tokens[-1]
        biased = lease(engine, max_tokens=4, logprobs=2, logit_bias={half: 100.0})
        words = ResponseFormat("json_schema", {"const": "水車 🚰"})
        never, whole = await run(engine, biased, lease(engine, max_tokens=60, logprobs=1, response_format=words))
        for result in (never, whole):
            entries = entries_of(result)
            assert [id for id in result.ids if id < 0] == []
            assert len(entries) == len(result.ids)
            assert any(entry.data is not None for entry in entries), "half a character is no text"
        assert set(never.ids) == {half}
        assert spelled(entries_of(whole)).startswith(json.dumps("水車 🚰", ensure_ascii=False))

    # ------------------------------------------------------------------------------------ replies that obey a schema

    async def test_a_guided_reply_obeys_its_schema(self, engine: Engine) -> None:
        needs(engine, "response_format")
        guided = [guided_lease(engine, temperature=0.8, seed=seed) for seed in range(4)]
        for result in await run(engine, *guided):
            assert result.finish == Finish(("stop",))
            assert_obeys(result.text)

    async def test_any_object(self, engine: Engine) -> None:
        needs(engine, "response_format")
        wanted = lease(engine, max_tokens=400, temperature=0.8, response_format=ResponseFormat("json_object"))
        (result,) = await run(engine, wanted)
        assert result.finish is not None
        assert result.finish.error is None
        assert result.text.startswith("{")
        if result.finish.finish_reasons == ("stop",):
            assert isinstance(json.loads(result.text), dict)

    async def test_a_guided_reply_is_cut_by_max_tokens(self, engine: Engine) -> None:
        needs(engine, "response_format")
        (result,) = await run(engine, guided_lease(engine, max_tokens=4))
        assert result.finish == Finish(("length",))
        assert len(result.ids) == 4

    async def test_a_guided_reply_resumes_inside_its_json(self, engine: Engine) -> None:
        needs(engine, "response_format")
        (whole,) = await run(engine, guided_lease(engine))
        assert_obeys(whole.text)
        for cut in sorted({1, len(whole.ids) // 3, len(whole.ids) // 2, len(whole.ids) - 1, len(whole.ids)}):
            logged: dict[str, Any] = {"prefix": whole.ids[:cut], "texts": whole.texts[:cut], "attempt": 2}
            (rest,) = await run(engine, guided_lease(engine, **logged))
            # (One of which nobody has seen a character may begin anew: tokens that came together have one text.)
            if not self.guided_replies_resume and cut < len(whole.ids) and any(logged["texts"]):
                assert rest.finish is not None
                assert rest.finish.error is not None, "it says so, and does not begin anew in the middle"
                assert not rest.ids
                continue
            assert rest.finish == Finish(("stop",))
            assert_obeys("".join(whole.texts[:cut]) + rest.text)
            if engine.models[0].deterministic:
                assert whole.ids[:cut] + rest.ids == whole.ids

    async def test_a_guided_reply_disturbs_nobody(self, engine: Engine) -> None:
        needs(engine, "response_format")
        needs_determinism(engine)
        (alone,) = await run(engine, lease(engine))
        first, guided, last = await run(engine, lease(engine), guided_lease(engine), lease(engine))
        assert first.ids == last.ids == alone.ids
        assert_obeys(guided.text)

    async def test_a_schema_that_cannot_be_followed_is_refused(self, engine: Engine) -> None:
        needs(engine, "response_format")
        bad = ResponseFormat("json_schema", {"type": "object", "properties": {"a": {"type": "nonsense"}}})
        refused, good = await run(engine, lease(engine, response_format=bad), lease(engine))
        assert refused.finish is not None
        assert refused.finish.error is not None
        assert good.finish == Finish(("length",))

    async def test_a_call_that_must_be_made(self, engine: Engine) -> None:
        needs(engine, "response_format", "tools")
        if not engine.models[0].chat:
            pytest.skip("no chat template")
        tools = (Tool("look_up", "Looks a person up.", PERSON), Tool("wait", "Waits."))
        asked = {"messages": (Message("user", "Who is it?"),), "tools": tools, "tool_choice": "required"}
        wanted = guided_lease(engine, response_format=None, tool_name="look_up", **asked)
        (result,) = await run(engine, wanted)
        assert result.finish == Finish(("tool_calls",))
        content, (call,) = parse_tool_calls(result.text, wanted.job.request)
        assert content is None
        assert call.name == "look_up"
        assert_obeys(call.arguments)

    # ------------------------------------------------------------------------------------ replies of another form

    @pytest.mark.parametrize(
        ("form", "right"),
        [
            (ResponseFormat("regex", pattern=r"[A-Z][a-z]{2,9}é\d{3}"), r"[A-Z][a-z]{2,9}é\d{3}"),
            (ResponseFormat("choice", choices=("yes, it is", 'no "🚰"', "perhaps\n")), 'yes, it is|no "🚰"|perhaps\n'),
            (ResponseFormat("grammar", grammar='start: "<" N ("," N){1,3} ">"\nN: /[0-9]/'), "<[0-9](,[0-9]){1,3}>"),
            (ResponseFormat("grammar", grammar='root ::= "a" ("b" | "c")+ "d"'), "a[bc]+d"),
        ],
        ids=["regex", "choice", "lark", "gbnf"],
    )
    async def test_a_guided_reply_of_another_form(self, engine: Engine, form: ResponseFormat, right: str) -> None:
        needs(engine, "response_format")
        settings: dict[str, Any] = {"max_tokens": 200, "response_format": form}
        for wanted in ({"temperature": 0.9, "seed": 3}, {"stop": ("no such words",)}):
            (whole,) = await run(engine, lease(engine, **settings, **wanted))
            if whole.finish != Finish(("length",)):
                assert whole.finish == Finish(("stop",))
                assert re.fullmatch(right, whole.text)
            for cut in sorted({1, len(whole.ids) // 2}):
                if not self.guided_replies_resume:
                    break
                logged: dict[str, Any] = {"prefix": whole.ids[:cut], "texts": whole.texts[:cut], "attempt": 2}
                (rest,) = await run(engine, lease(engine, **settings, **wanted, **logged))
                if rest.finish != Finish(("length",)):
                    assert re.fullmatch(right, "".join(whole.texts[:cut]) + rest.text)

    @pytest.mark.parametrize(
        "form",
        [
            ResponseFormat("regex", pattern="(?<=a)b"),
            ResponseFormat("regex", pattern="(a{1000}){1000}"),
            ResponseFormat("choice", choices=()),
            ResponseFormat("grammar", grammar="start: nobody"),
            ResponseFormat("grammar", grammar='root ::= "a" ('),
        ],
        ids=["look-behind", "too large", "none", "unknown name", "broken"],
    )
    async def test_a_guided_reply_of_a_form_that_is_none(self, engine: Engine, form: ResponseFormat) -> None:
        needs(engine, "response_format")
        refused, good = await run(engine, lease(engine, response_format=form), lease(engine))
        assert refused.finish is not None
        assert refused.finish.error is not None
        assert (refused.finish.error.code, refused.finish.error.param) == ("invalid_request", "response_format")
        assert good.finish == Finish(("length",))

    # ------------------------------------------------------------------------------------ where a reply may end

    async def test_no_end_before_min_tokens(self, engine: Engine) -> None:
        needs(engine, "min_tokens", "stop_token_ids")
        (free,) = await run(engine, lease(engine, max_tokens=30))
        end, stop = free.ids[2], free.text[:2]
        first = free.ids.index(end)
        settings: dict[str, Any] = {"max_tokens": 30, "stop_token_ids": (end,)}
        at_once, later, words = await run(
            engine,
            lease(engine, **settings),
            lease(engine, min_tokens=12, **settings),
            lease(engine, max_tokens=30, min_tokens=12, stop=(stop,)),
        )
        assert at_once.ids == free.ids[: first + 1]
        assert free.text.startswith(at_once.text)
        if engine.models[0].deterministic:  # elsewhere tokens that came together have one text
            assert at_once.text == "".join(free.texts[:first])
        assert at_once.finish is not None
        assert at_once.finish.finish_reasons == ("stop",)
        assert end not in later.ids[:12]
        assert len(later.ids) > 12
        assert len(words.ids) >= 12
        assert words.text.startswith(stop)
        if engine.models[0].deterministic:
            for cut in (1, 5, 11, 13):
                logged: dict[str, Any] = {"prefix": later.ids[:cut], "texts": later.texts[:cut], "attempt": 2}
                (rest,) = await run(engine, lease(engine, min_tokens=12, **settings, **logged))
                assert later.ids[:cut] + rest.ids == later.ids

    async def test_bad_words_are_not_written(self, engine: Engine) -> None:
        needs(engine, "bad_words")
        (free,) = await run(engine, lease(engine, max_tokens=40))
        bad = tuple(word for word in re.findall(r"\w+", free.text)[:8])
        (result,) = await run(engine, lease(engine, max_tokens=40, bad_words=bad))
        found = [entry for entry in re.findall(r" (\w+)(?= )", result.text) if entry in bad]
        assert result.text != free.text
        assert len(found) < len([entry for entry in re.findall(r" (\w+)(?= )", free.text) if entry in bad])
        if engine.models[0].deterministic:
            logged: dict[str, Any] = {"prefix": result.ids[:9], "texts": result.texts[:9], "attempt": 2}
            (rest,) = await run(engine, lease(engine, max_tokens=40, bad_words=bad, **logged))
            assert result.ids[:9] + rest.ids == result.ids

    async def test_ids_to_stop_at_are_the_models(self, engine: Engine) -> None:
        needs(engine, "stop_token_ids")
        (result,) = await run(engine, lease(engine, stop_token_ids=(10_000_000,)))
        assert result.finish is not None
        assert result.finish.error is not None
        assert (result.finish.error.code, result.finish.error.param) == ("invalid_request", "stop_token_ids")

    # ------------------------------------------------------------------------------------ tokens

    async def test_the_tokens_of_a_prompt_are_those_that_a_reply_is_made_from(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        needs_determinism(engine)
        (found,) = await run(engine, task_lease(engine, "tokenize", prompt=PROMPTS[4]))
        by_text, by_ids = await run(
            engine, lease(engine, PROMPTS[4]), lease(engine, prompt_ids=tuple(found.tokenized.tokens))
        )
        assert by_ids.ids == by_text.ids
        assert by_ids.prompt_counts == by_text.prompt_counts == found.prompt_counts

    async def test_the_tokens_of_messages_are_those_that_a_reply_is_made_from(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        if not engine.models[0].chat:
            pytest.skip("no chat template")
        asked = (Message("user", "What is the colour of <|end|> the sky?"),)
        (found,) = await run(engine, task_lease(engine, "tokenize", messages=asked))
        (reply,) = await run(engine, lease(engine, messages=asked))
        assert found.prompt_counts == reply.prompt_counts == [len(found.tokenized.tokens)]
        if engine.models[0].deterministic:
            (by_ids,) = await run(engine, lease(engine, prompt_ids=tuple(found.tokenized.tokens)))
            assert by_ids.ids == reply.ids

    async def test_half_a_character_in_a_past_call_harms_nobody(self, engine: Engine) -> None:
        """Text that is made inside the engine is checked where it leaves for the tokenizer."""
        needs(engine, "tools")
        if not engine.models[0].chat:
            pytest.skip("no chat template")
        asked = [lease(engine), lease(engine, messages=HALF), lease(engine)]
        for result in await run(engine, *asked):
            assert result.finish == Finish(("length",))
        if "tokenize" in engine.models[0].tasks:
            (found,) = await run(engine, task_lease(engine, "tokenize", messages=HALF))
            assert found.tokenized.tokens

    async def test_tokens_do_not_wait_for_replies(self, engine: Engine) -> None:
        needs_task(engine, "tokenize")
        driver = Driver(engine)
        replies = [driver.add(lease(engine, max_tokens=400)) for _ in range(min(engine.slots, 16))]
        (found,) = await driver.finish(driver.add(task_lease(engine, "tokenize", prompt="Rain")))
        assert found.tokenized.tokens
        assert any(driver.results[key].finish is None for key in replies)
        for key in replies:
            driver.abort(key)

    # ------------------------------------------------------------------------------------ score

    async def test_a_score_has_an_entry_for_each_token_of_the_prompt(self, engine: Engine) -> None:
        needs_task(engine, "score")
        prompt = " and ".join(PROMPTS * 4)  # more than is scored in a step
        (found,) = await run(engine, task_lease(engine, "tokenize", prompt=prompt))
        (result,) = await run(engine, score_lease(engine, 3, prompt=prompt))
        assert result.ids == found.tokenized.tokens
        assert len(result.ids) > 100
        assert result.finish == Finish(("stop",))
        assert result.prompt_counts == [len(result.ids)]
        assert prompt in result.text
        first, *others = result.scores
        assert first is None
        for score in others:
            assert score is not None
            assert score.logprob <= 0
            assert [top.logprob for top in score.top[:3]] == sorted(
                (top.logprob for top in score.top[:3]), reverse=True
            )
            assert max(top.logprob for top in score.top) >= score.logprob

    async def test_a_score_is_what_a_reply_tells_of_its_tokens(self, engine: Engine) -> None:
        needs_task(engine, "score")
        needs_determinism(engine)
        (found,) = await run(engine, task_lease(engine, "tokenize", prompt=PROMPTS[4]))
        begun = tuple(found.tokenized.tokens)
        driver = Driver(engine)
        (reply,) = await run(engine, lease(engine, prompt_ids=begun, max_tokens=90, logprobs=0))
        for others in (0, 3):  # alone, and beside those that draw
            beside = [driver.add(lease(engine, prompt, max_tokens=60)) for prompt in PROMPTS[:others]]
            (result,) = await driver.finish(driver.add(score_lease(engine, 0, prompt_ids=(*begun, *reply.ids))))
            told = [score.logprob for score in result.scores[len(begun) :] if score is not None]
            drawn = [score.logprob for score in reply.scores if score is not None]
            assert len(told) == len(drawn) == len(reply.ids)
            assert max(abs(a - b) for a, b in zip(told, drawn, strict=True)) < 1e-3
            await driver.finish(*beside)

    async def test_a_score_goes_on_where_an_earlier_attempt_was(self, engine: Engine) -> None:
        needs_task(engine, "score")
        needs_determinism(engine)
        prompt = " and ".join(PROMPTS * 2)
        (whole,) = await run(engine, score_lease(engine, 2, prompt=prompt))
        for had in (1, 2, 70, len(whole.ids) - 1, len(whole.ids)):
            logged = {"prefix": whole.ids[:had], "texts": whole.texts[:had]}
            (rest,) = await run(engine, score_lease(engine, 2, prompt=prompt, **logged))
            assert rest.ids == whole.ids[had:]
            assert rest.text == "".join(whole.texts[had:])
            assert [score and round(score.logprob, 3) for score in rest.scores] == [
                score and round(score.logprob, 3) for score in whole.scores[had:]
            ]

    async def test_a_prompt_of_one_token_and_one_of_the_whole_context_can_be_scored(self, engine: Engine) -> None:
        needs_task(engine, "score")
        context = engine.models[0].context_length
        one, whole, more = await run(
            engine,
            score_lease(engine, 1, prompt_ids=(7,)),
            score_lease(engine, 0, prompt_ids=(7, 8) * (context // 2)),
            score_lease(engine, 0, prompt_ids=(7,) * (context + 1)),
        )
        assert (one.ids, one.scores) == ([7], [None])
        assert len(whole.ids) == context // 2 * 2
        assert more.finish is not None
        assert more.finish.error is not None
        assert more.finish.error.code == "context_length_exceeded"

    async def test_scores_are_dropped_at_any_step(self, engine: Engine) -> None:
        needs_task(engine, "score")
        driver = Driver(engine)
        keys = [driver.add(score_lease(engine, 0, prompt=" and ".join(PROMPTS * 8))) for _ in range(4)]
        beside = driver.add(lease(engine, max_tokens=30))
        for key in keys[:3]:
            await driver.step()
            driver.abort(key)
        last, reply = await driver.finish(keys[3], beside)
        assert last.scores[1:]
        assert all(last.scores[1:])
        assert reply.ids

    # ------------------------------------------------------------------------------------ batching

    async def test_joins_and_leaves_at_any_step(self, engine: Engine) -> None:
        driver = Driver(engine)
        keys = []
        for i, prompt in enumerate(PROMPTS):
            keys.append(driver.add(lease(engine, prompt, max_tokens=5 + 9 * (i % 3))))
            await driver.step()
        results = await driver.finish()
        assert [len(result.ids) for result in results] == [5 + 9 * (i % 3) for i in range(len(PROMPTS))]

    async def test_all_slots_advance_together(self, engine: Engine) -> None:
        driver = Driver(engine)
        keys = [driver.add(lease(engine, PROMPTS[i % 8], max_tokens=200)) for i in range(min(engine.slots, 64))]
        while not all(driver.results[key].ids for key in keys):
            await driver.step()
            assert all(driver.results[key].finish is None for key in keys), "one ended before another began"
        for key in keys:
            driver.abort(key)

    async def test_abort_ends_the_outputs_and_frees_the_slot(self, engine: Engine) -> None:
        driver = Driver(engine)
        for _ in range(3):  # more than the slots in all
            keys = [driver.add(lease(engine, max_tokens=500)) for _ in range(engine.slots)]
            await driver.step()
            for key in keys:
                driver.abort(key)
        counts = {key: len(result.ids) for key, result in driver.results.items()}
        last = driver.add(lease(engine, max_tokens=8))
        await driver.finish(last)
        assert len(driver.results[last].ids) == 8
        late = {key: len(driver.results[key].ids) - count for key, count in counts.items()}
        # What was on its way may still come, but it stops long before the 500 that were asked for.
        assert all(len(driver.results[key].ids) < 500 for key in counts), late

    async def test_aborting_the_unknown_is_harmless(self, engine: Engine) -> None:
        engine.abort(123_456)
        (result,) = await run(engine, lease(engine, max_tokens=3))
        assert len(result.ids) == 3

    # ------------------------------------------------------------------------------------ determinism and resume

    async def test_greedy_alone_is_greedy_in_a_batch(self, engine: Engine) -> None:
        needs_determinism(engine)
        alone = [(await run(engine, lease(engine, prompt)))[0].ids for prompt in PROMPTS]
        batch = await run(engine, *(lease(engine, PROMPTS[i % len(PROMPTS)]) for i in range(32)))
        for i, result in enumerate(batch):
            assert result.ids == alone[i % len(PROMPTS)]

    @pytest.mark.parametrize("temperature", [0.0, 0.9])
    async def test_a_resume_continues_as_if_nothing_had_happened(self, engine: Engine, temperature: float) -> None:
        needs_determinism(engine)
        # Few candidates: among thousands, a last-bit difference between a prefill and a step may tip a draw.
        settings: dict[str, Any] = {"max_tokens": 30, "temperature": temperature, "seed": 7, "top_k": 5}
        for prompt in PROMPTS[:4]:
            (whole,) = await run(engine, lease(engine, prompt, **settings))
            for cut in (1, 7, 29):
                logged: dict[str, Any] = {"prefix": whole.ids[:cut], "texts": whole.texts[:cut]}
                (rest,) = await run(engine, lease(engine, prompt, **logged, **settings))
                assert whole.ids[:cut] + rest.ids == whole.ids
                assert rest.texts == whole.texts[cut:]
                assert rest.finish == whole.finish

    async def test_a_resume_of_several_choices(self, engine: Engine) -> None:
        needs_determinism(engine)
        needs(engine, "n")
        (whole,) = await run(engine, lease(engine, n=2, temperature=0.9, seed=3, top_k=5))
        prefix, texts, choices = whole.ids[:13], whole.texts[:13], whole.choices[:13]
        (rest,) = await run(
            engine, lease(engine, n=2, temperature=0.9, seed=3, top_k=5, prefix=prefix, texts=texts, choices=choices)
        )
        joined = list(zip(prefix + rest.ids, choices + rest.choices, strict=True))
        for choice in range(2):
            expected = [token for token, c in zip(whole.ids, whole.choices, strict=True) if c == choice]
            assert [token for token, c in joined if c == choice] == expected

    async def test_a_resume_after_the_last_token_only_ends(self, engine: Engine) -> None:
        (whole,) = await run(engine, lease(engine, max_tokens=6))
        (rest,) = await run(engine, lease(engine, max_tokens=6, prefix=whole.ids, texts=whole.texts))
        assert rest.ids == []
        assert rest.finish == whole.finish

    async def test_a_resume_gives_the_rest_and_nothing_twice(self, engine: Engine) -> None:
        """What every engine promises, deterministic or not: max_tokens counts from the reply's start."""
        (whole,) = await run(engine, lease(engine, max_tokens=12))
        for cut in (1, 5, 11):
            (rest,) = await run(
                engine, lease(engine, max_tokens=12, prefix=whole.ids[:cut], texts=whole.texts[:cut], attempt=2)
            )
            assert len(rest.ids) == 12 - cut
            assert rest.finish == Finish(("length",))

    async def test_a_seed_repeats_and_another_differs(self, engine: Engine) -> None:
        needs_determinism(engine)
        needs(engine, "seed")
        first, again, other = await run(
            engine, *(lease(engine, temperature=1.0, seed=seed, max_tokens=32) for seed in (11, 11, 12))
        )
        assert first.ids == again.ids
        assert first.ids != other.ids

    # ------------------------------------------------------------------------------------ life and death

    async def test_close_and_start_again(self, engine: Engine) -> None:
        await engine.close()
        await engine.start()
        (result,) = await run(engine, lease(engine, max_tokens=4))
        assert len(result.ids) == 4

    async def test_step_fails_once_the_engine_is_closed(self, engine: Engine) -> None:
        engine.add(1, lease(engine, max_tokens=1000))
        await engine.step()
        await engine.close()
        with pytest.raises(EngineDied):
            await forever(engine)
