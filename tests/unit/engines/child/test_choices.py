"""What is said of all choices of a request together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from penstock.core.errors import EngineError
from penstock.core.events import Phase
from penstock.core.ports import Finish, Output
from penstock.engines.child.choices import Choices, ThreadedChoices


def test_the_prompt_is_counted_once_and_the_finish_comes_with_the_last_end() -> None:
    choices = Choices(7, 2, 3)
    assert not choices.reported
    assert choices.output(1, [5], ["a"]) == Output(7, [5], ["a"], [1], None, 3)
    assert choices.reported
    assert choices.output(0, [6, 7], ["b", "c"], [None, None]) == Output(7, [6, 7], ["b", "c"], [0, 0], [None, None])
    assert choices.end(1, "stop", "END") is None
    assert choices.end(0, "length") == Output(7, finish=Finish(("length", "stop"), stops=(None, "END")))


def test_one_that_was_complete_before_it_began() -> None:
    assert Choices(7, 1, 3).end(0, "stop") == Output(7, prompt_tokens=3, finish=Finish(("stop",)))


def test_a_single_choice_needs_no_number() -> None:
    assert Choices(7, 1).output(0, [5], ["a"]).choices is None


def test_the_prompts_tokens_may_be_learnt_with_the_first_output() -> None:
    choices = Choices(7, 1)
    assert choices.output(0, [5], ["a"], prompt_tokens=4).prompt_tokens == 4
    assert choices.output(0, [6], ["b"], prompt_tokens=4).prompt_tokens is None


def test_what_was_cached_is_told_with_the_prompt() -> None:
    choices = Choices(7, 2, 3, cached_tokens=2)
    assert [choices.output(choice, [5], ["a"]).cached_tokens for choice in (1, 0)] == [2, 0]
    choices = Choices(7, 1, 3)
    choices.cached_tokens = 2
    assert choices.end(0, "stop") == Output(7, prompt_tokens=3, finish=Finish(("stop",)), cached_tokens=2)
    assert Choices(7, 1, 3, cached_tokens=9).output(0, [5], ["a"]).cached_tokens == 3, "the rest is of an earlier reply"
    learnt = Choices(7, 1).output(0, [5], ["a"], prompt_tokens=4, cached_tokens=1)
    assert (learnt.prompt_tokens, learnt.cached_tokens) == (4, 1)


def test_outputs_have_the_phases_that_they_are_given() -> None:
    choices = Choices(7, 1, 3)
    output = choices.output(0, [5], ["a"], phases=[Phase.REASONING])
    output.extend(choices.output(0, [6], ["b"]))
    assert output.phases == [Phase.REASONING, Phase.TEXT]
    assert choices.output(0, [7], ["c"]).phases is None


def test_the_first_error_is_the_requests() -> None:
    choices = Choices(7, 3, 1)
    first = EngineError("first")
    assert choices.end(2, "stop", error=first) is None
    assert choices.end(0, "stop", error=EngineError("second")) is None
    assert choices.end(1, "stop") == Output(7, prompt_tokens=1, finish=Finish(error=first.info))


def test_an_aborted_request_has_no_end() -> None:
    choices = ThreadedChoices(7, 1, 1)
    choices.over = True
    assert choices.end(0, "stop") is None


def test_in_threads_one_output_has_the_prompt_and_one_the_finish() -> None:
    choices = ThreadedChoices(7, 64, 9)

    def run(choice: int) -> list[Output]:
        last = choices.end(choice, "stop") if (said := choices.output(choice, [1], ["x"])) else None
        return [said, *([last] if last else [])]

    with ThreadPoolExecutor(16) as threads:
        outputs = [output for found in threads.map(run, range(64)) for output in found]
    assert [output.prompt_tokens for output in outputs if output.prompt_tokens is not None] == [9]
    assert [output.finish for output in outputs if output.finish is not None] == [Finish(("stop",) * 64)]
