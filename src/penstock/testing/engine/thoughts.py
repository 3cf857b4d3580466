"""Thoughts and calls of tools: what each token of a reply is part of, wherever another attempt takes over."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from penstock.core.calls import read_calls
from penstock.core.events import Phase, phase_of
from penstock.core.job import Message, ResponseFormat, Tool
from penstock.core.ports import Engine, Finish, Lease
from penstock.testing.engine.driver import Contract, Result, lease, needs, run


@dataclass(frozen=True)
class Script:
    """What a model says, always: to ``ask_call`` the ``thought``, the ``text`` and the ``calls`` (of ``tools``); to
    ``ask_answer`` the thought and ``answer`` as JSON; to ``ask_forced``, where it has to make a call, the thought and
    the first of the calls. The word ``stop`` is both in the thought and in the text."""

    tools: tuple[Tool, ...]
    ask_call: str
    ask_answer: str
    ask_forced: str
    thought: str
    text: str
    calls: list[tuple[str, dict[str, Any]]]
    answer: dict[str, Any]
    stop: str


class ThoughtContract(Contract):
    """For an engine of a model whose replies are known: give it a fixture ``script`` beside the ``engine``."""

    @pytest.fixture
    def script(self) -> Script:
        raise NotImplementedError

    def _lease(self, engine: Engine, message: str, **fields: Any) -> Lease:
        defaults: dict[str, Any] = {"max_tokens": 300, "ignore_eos": False}
        return lease(engine, messages=(Message("user", message),), **{**defaults, **fields})

    def _call(self, engine: Engine, script: Script, **fields: Any) -> Lease:
        return self._lease(engine, script.ask_call, **{"tools": script.tools, **fields})

    async def test_thoughts_text_and_calls_are_told_apart(self, engine: Engine, script: Script) -> None:
        (result,) = await run(engine, self._call(engine, script))
        assert_says(result, script)
        assert result.finish == Finish(("tool_calls",))
        spoken = [phase_of(phase) for phase, text in zip(result.phases, result.texts, strict=True) if text]
        thoughts = spoken.count(Phase.REASONING)
        assert thoughts > 1, "a thought comes token by token"
        assert spoken[:thoughts] == [Phase.REASONING] * thoughts

    async def test_calls_are_made_of_given_tools_only(self, engine: Engine, script: Script) -> None:
        (result,) = await run(engine, self._call(engine, script, tools=()))
        assert result.folded.reasoning[0].strip() == script.thought
        assert not result.folded.calls[0]
        assert result.text.startswith(script.text)
        assert result.finish == Finish(("stop",))

    async def test_a_reply_goes_on_wherever_it_broke_off(self, engine: Engine, script: Script) -> None:
        """In a thought, in a mark, in a call, behind its end: the log is what it would have been."""
        (whole,) = await run(engine, self._call(engine, script))
        cuts = range(1, len(whole.ids) + 1)
        rests = await run(engine, *(self._call(engine, script, attempt=2, **logged(whole, cut)) for cut in cuts))
        for cut, rest in zip(cuts, rests, strict=True):
            assert whole.ids[:cut] + rest.ids == whole.ids
            assert rest.texts == whole.texts[cut:]
            assert rest.phases == whole.phases[cut:]
            assert rest.finish == whole.finish

    async def test_a_stop_string_is_looked_for_in_the_text_only(self, engine: Engine, script: Script) -> None:
        wanted = self._call(engine, script, stop=(script.stop,))
        (result,) = await run(engine, wanted)
        assert result.folded.reasoning[0].strip() == script.thought
        assert result.text.strip() == script.text.partition(script.stop)[0].strip()
        assert not result.folded.calls[0]
        assert result.finish == Finish(("stop",), stops=(script.stop,) if self.tells_stops else ())

    async def test_a_limit_within_a_thought(self, engine: Engine, script: Script) -> None:
        (result,) = await run(engine, self._call(engine, script, max_tokens=7))
        assert script.thought.startswith(result.folded.reasoning[0].strip())
        assert result.folded.reasoning[0].strip()
        assert (result.text, result.folded.calls[0]) == ("", "")
        assert result.finish == Finish(("length",))

    async def test_a_form_holds_behind_the_thought(self, engine: Engine, script: Script) -> None:
        needs(engine, "response_format")
        schema = {"type": "object", "properties": {"turns": {"type": "boolean"}, "why": {"type": "string"}}}
        for form in (ResponseFormat("json_object"), ResponseFormat("json_schema", schema)):
            wanted: dict[str, Any] = {"response_format": form}
            (whole,) = await run(engine, self._lease(engine, script.ask_answer, **wanted))
            assert whole.folded.reasoning[0].strip() == script.thought
            assert json.loads(whole.text) == script.answer
            assert whole.finish == Finish(("stop",))
            for cut in (1, len(whole.ids) // 2, len(whole.ids) - 2):
                again = self._lease(engine, script.ask_answer, **wanted, **logged(whole, cut), attempt=2)
                (rest,) = await run(engine, again)
                assert whole.texts[:cut] + rest.texts == whole.texts
                assert rest.finish == whole.finish

    async def test_a_call_that_must_be_made_comes_behind_the_thought(self, engine: Engine, script: Script) -> None:
        needs(engine, "response_format")
        name, values = script.calls[0]
        asked: dict[str, Any] = {"tools": script.tools, "tool_choice": "required", "tool_name": name}
        (whole,) = await run(engine, self._lease(engine, script.ask_forced, **asked))
        assert whole.folded.reasoning[0].strip() == script.thought
        assert whole.text.strip() == ""
        assert [(call.name, json.loads(call.arguments)) for call in read_calls(whole.folded.calls[0])] == [
            (name, values)
        ]
        assert whole.finish == Finish(("tool_calls",))
        cuts = (1, len(whole.ids) // 2, len(whole.ids) - 2)
        rests = await run(
            engine, *(self._lease(engine, script.ask_forced, **asked, **logged(whole, cut), attempt=2) for cut in cuts)
        )
        for cut, rest in zip(cuts, rests, strict=True):
            assert (whole.texts[:cut] + rest.texts, rest.finish) == (whole.texts, whole.finish)

    async def test_each_choice_thinks_for_itself(self, engine: Engine, script: Script) -> None:
        needs(engine, "n")
        (result,) = await run(engine, self._call(engine, script, n=2))
        assert [each.strip() for each in result.folded.reasoning] == [script.thought] * 2
        assert [len(read_calls(each)) for each in result.folded.calls] == [len(script.calls)] * 2
        assert result.finish == Finish(("tool_calls",) * 2)


def logged(whole: Result, cut: int) -> dict[str, Any]:
    """The first *cut* tokens, for a lease that continues them."""
    return {"prefix": whole.ids[:cut], "texts": whole.texts[:cut], "phases": whole.phases[:cut]}


def assert_says(result: Result, script: Script) -> None:
    """Thought, text and calls are the script's."""
    assert result.folded.reasoning[0].strip() == script.thought
    assert result.text.strip() == script.text
    called = [(call.name, json.loads(call.arguments)) for call in read_calls(result.folded.calls[0])]
    assert called == script.calls
