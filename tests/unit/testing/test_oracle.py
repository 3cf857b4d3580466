"""The judge is judged first: a valid log passes, and each single corruption is named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.events import Ended, Event, Phase, TokenPhase, Tokens
from penstock.core.job import Status, Usage
from penstock.testing.oracle import (
    End,
    OracleError,
    Token,
    check_log,
    check_views,
    flatten,
    problems,
    tokens_of,
    view_problems,
)


def run(position: int, attempt: int, *ids: int, choices: list[int] | None = None) -> Tokens:
    return Tokens(position, attempt, list(ids), [f"{i} " for i in ids], choices)


def done(position: int, attempt: int = 1, status: Status = Status.COMPLETED, tokens: int | None = None) -> Ended:
    return Ended(position, attempt, status, ("stop",), Usage(3, position - 1 if tokens is None else tokens))


def phased(*tokens: tuple[str, TokenPhase], reason: str = "stop", thoughts: int = 0) -> list[Event]:
    """A log of these tokens: the text of each and its phase."""
    texts, phases = [list(each) for each in zip(*tokens, strict=True)]
    ended = Ended(len(tokens) + 1, 1, Status.COMPLETED, (reason,), Usage(3, len(tokens), thoughts))
    return [Tokens(1, 1, [*range(len(tokens))], texts, phases=phases), ended]


GOOD: list[Event] = [run(1, 1, 10, 11), run(3, 1, 12), run(4, 2, 13, 14), done(6, 2)]


@dataclass
class Sse:
    event: str | None
    data: Any
    id: str | None = None


def sse(position: int, attempt: int, token: int, job: str = "job_a") -> Sse:
    data = {"job_id": job, "token": f"{token} ", "token_id": token, "attempt": attempt}
    return Sse("token", json.dumps(data), str(position))


def sse_done(position: int, job: str = "job_a", status: str = "completed") -> Sse:
    usage = {"prompt_tokens": 3, "completion_tokens": position - 1}
    return Sse("done", {"job_id": job, "status": status, "finish_reason": "stop", "usage": usage}, str(position))


def test_a_good_log_passes_and_gives_its_tokens() -> None:
    assert [token.id for token in check_log(GOOD)] == [10, 11, 12, 13, 14]


def test_an_ended_log_without_tokens_is_good() -> None:
    assert problems([done(1, 0, Status.CANCELLED)]) == []


def test_a_view_that_begins_later_is_good() -> None:
    assert problems([run(4, 2, 13, 14), done(6, 2)], after=3) == []


def test_an_open_log_is_good_only_when_it_may_be_incomplete() -> None:
    assert problems(GOOD[:-1], complete=False) == []
    assert "no terminal event" in problems(GOOD[:-1])[0]


@pytest.mark.parametrize(
    ("events", "word"),
    [
        pytest.param([run(1, 1, 1, 2), run(4, 1, 4), done(5)], "gap", id="gap"),
        pytest.param([run(2, 1, 1, 2), done(4)], "gap", id="does not begin at 1"),
        pytest.param([run(1, 1, 1, 2), run(2, 1, 2, 3), done(4)], "again", id="duplicate"),
        pytest.param([run(1, 1, 1), run(3, 1, 3), run(2, 1, 2), done(4)], "out of order", id="reordered"),
        pytest.param([run(1, 2, 1), run(2, 1, 2), done(3, 2)], "attempt fell", id="zombie interleaved"),
        pytest.param([run(1, 2, 1), done(2, 1)], "attempt fell", id="ended by a zombie"),
        pytest.param([run(1, 1, 1), done(2), done(2)], "second terminal", id="two ends"),
        pytest.param([run(1, 1, 1), done(2), run(2, 1, 2)], "after the terminal", id="token after the end"),
        pytest.param([run(1, 1, 1), done(3)], "terminal event is at", id="end too far"),
        pytest.param([run(1, 1, 1, 2), done(2)], "terminal event is at", id="end too near"),
        pytest.param([run(1, 1, 1), done(2, tokens=7)], "usage counts", id="usage does not add up"),
        pytest.param([run(1, 1, 1), done(2, status=Status.RUNNING)], "status", id="end that is no end"),
        pytest.param([], "no terminal", id="nothing"),
    ],
)
def test_each_corruption_is_named(events: list[Event], word: str) -> None:
    assert any(word in problem for problem in problems(events))
    with pytest.raises(OracleError, match=word):
        check_log(events)


CALL = ('{"name": "f", "arguments": {}}\n', Phase.TOOL)
BORDER: TokenPhase = [(Phase.REASONING, 1), (Phase.TEXT, 2)]


def test_a_good_log_with_thoughts_and_calls_passes() -> None:
    check_log(phased(("hm", Phase.REASONING), ("m, a", [(Phase.REASONING, 1), (Phase.TEXT, 3)]), thoughts=2))
    check_log(phased(("a", Phase.TEXT), CALL, CALL, reason="tool_calls"))
    check_log(phased(("a", Phase.TEXT), (CALL[0][:9], Phase.TOOL), reason="length"))


@pytest.mark.parametrize(
    ("events", "word"),
    [
        pytest.param(phased(("a", BORDER), thoughts=1), "segments of position 1", id="segments"),
        pytest.param(phased(("a", Phase.REASONING)), "counts 0 tokens of thoughts", id="thoughts"),
        pytest.param(phased((CALL[0][:9], Phase.TOOL)), "not whole", id="cut off"),
        pytest.param(phased(CALL, ("f()", Phase.TOOL)), "not whole", id="no call"),
        pytest.param(phased(("{}", Phase.TOOL)), "not whole", id="not the form"),
        pytest.param(phased(("a", Phase.TEXT), reason="tool_calls"), "has none", id="none"),
    ],
)
def test_each_corruption_of_phases_is_named(events: list[Event], word: str) -> None:
    assert any(word in problem for problem in problems(events))


def test_views_must_agree_on_phases() -> None:
    log = phased(("a", Phase.REASONING), ("b c", BORDER), thoughts=2)
    token = {"attempt": 1, "job_id": "job_a"}
    stream = [
        Sse("token", {**token, "token": "a", "token_id": 0, "phase": "reasoning"}, "1"),
        Sse("token", {**token, "token": "b c", "token_id": 1, "phase": [["reasoning", 1], ["text", 2]]}, "2"),
        Sse("done", {"status": "completed", "usage": {"completion_tokens": 2, "reasoning_tokens": 2}}, "3"),
    ]
    check_log(stream)
    check_views([log, stream])
    assert "differ at position 1" in view_problems([log, phased(("a", Phase.TEXT), ("b c", BORDER))])[0]


def test_sse_events_are_judged_like_core_events() -> None:
    stream = [sse(1, 1, 10), Sse("ping", "x"), Sse(None, ""), sse(2, 2, 11), sse_done(3)]
    assert [token.text for token in check_log(stream, job="job_a")] == ["10 ", "11 "]
    assert any("gap" in problem for problem in problems([sse(1, 1, 10), sse(3, 1, 12), sse_done(4)]))
    assert any("attempt fell" in problem for problem in problems([sse(1, 2, 10), sse(2, 1, 11), sse_done(3)]))


def test_an_sse_error_event_is_a_terminal_event() -> None:
    error = Sse("error", {"job_id": "job_a", "status": "failed", "error": {"message": "no"}}, "2")
    assert problems([sse(1, 1, 10), error]) == []


def test_a_foreign_token_is_found() -> None:
    assert any(
        "foreign" in problem for problem in problems([sse(1, 1, 1), sse(2, 1, 2, "job_b"), sse_done(3)], job="job_a")
    )


def test_malformed_sse_is_an_oracle_error() -> None:
    with pytest.raises(OracleError, match="no id"):
        flatten([Sse("token", {"token_id": 1})])
    with pytest.raises(OracleError, match="not an object"):
        flatten([Sse("token", "[1]", "1")])


def test_views_that_overlap_must_agree() -> None:
    check_views([GOOD, GOOD[1:], GOOD[:2], [run(3, 1, 12), run(4, 2, 13)]])
    with pytest.raises(OracleError, match="differ at position 4"):
        check_views([GOOD, [run(4, 2, 99)]])
    assert "differ" in view_problems([GOOD, [run(4, 1, 13)]])[0], "the attempt is part of what was seen"


def test_views_must_agree_on_the_end() -> None:
    assert "different ends" in view_problems([GOOD, [done(6, 2, Status.FAILED)]])[0]
    assert any("saw the end at 5" in problem for problem in view_problems([GOOD, [done(5, 2)]]))


def test_a_log_and_an_sse_view_of_it_agree() -> None:
    log: list[Event] = [run(1, 1, 10, 11, choices=[0, 1]), done(3)]
    check_views([log, [sse(1, 1, 10), sse(2, 1, 11), sse_done(3)]])
    assert view_problems([log, [sse(1, 1, 10), sse(2, 1, 12), sse_done(3)]])


def test_the_message_stays_readable() -> None:
    with pytest.raises(OracleError, match="and 80 more"):
        check_log([Token(1, 5, "x") for _ in range(101)], complete=False)


@st.composite
def logs(draw: st.DrawFn) -> list[Event]:
    events: list[Event] = []
    position, attempt = 1, 1
    for size in draw(st.lists(st.integers(1, 5), max_size=8)):
        attempt += draw(st.integers(0, 2))
        events.append(run(position, attempt, *draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))))
        position += size
    return [*events, done(position, attempt)]


@settings(max_examples=200, database=None, derandomize=True)
@given(logs(), st.data())
def test_every_valid_log_passes_and_every_single_edit_is_seen(log: list[Event], data: st.DataObject) -> None:
    """Drop, double, or swap any one item of a valid log: the oracle always objects."""
    assert problems(log) == []
    items = flatten(log)
    i = data.draw(st.integers(0, len(items) - 1))
    edit = data.draw(st.sampled_from(["drop", "double", "swap", "older"]))
    broken = list(items)
    if edit == "drop":
        del broken[i]
    elif edit == "double":
        broken.insert(i, items[i])
    elif edit == "swap" and len(items) > 1:
        j = (i + 1) % len(items)
        broken[i], broken[j] = broken[j], broken[i]
    else:
        item = items[i]
        late = Token(item.position or 0, 1, "", 0) if isinstance(item, Token) else End(item.position, item.status, 0)
        broken = [*items[:i], late, *items[i + 1 :]]
        if i == 0:
            return  # the first item may have any attempt
    assert problems(broken)


@given(logs())
@settings(max_examples=50, database=None, derandomize=True)
def test_cutting_runs_anywhere_changes_nothing(log: list[Event]) -> None:
    cut: list[Event] = []
    for event in log:
        if isinstance(event, Tokens) and len(event.ids) > 1:
            head = Tokens(event.position, event.attempt, event.ids[:1], event.texts[:1])
            cut += [head, event.after(event.position)]
        else:
            cut.append(event)
    assert tokens_of(cut) == tokens_of(log)
    check_views([log, cut])
