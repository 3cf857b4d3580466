"""Log-probabilities as each dialect writes them: of the tokens themselves, however the log falls into runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.events import Completion, Ended, Event, Logprob, Tokens, TopLogprob, fold
from penstock.core.job import Job, Message, Request, Sampling, Status, Tool, Usage, new_job_id
from penstock.gateway.dialects.openai.stream import ChatWriter, ChunkWriter, TextWriter
from penstock.gateway.dialects.responses.items import View
from penstock.gateway.dialects.responses.stream import whole
from tests.support.sse import Parser

#: (id, what it completed, its own text, its bytes where they are no text): a character of three tokens, a stop string
#: that became one, one that did not.
TOKENS = [
    (1, "The ", "The ", None),
    (2, "", "\ufffd", b"\xe6\xb0"),
    (3, "水", "\ufffd", b"\xb4"),
    (4, " ", " EN", None),
    (5, "ENx", "x", None),
    (6, "", "\ufffd", b"\xff"),
    (7, "\ufffd ", " END", None),
    (8, "", "<|end|>", None),
]
OFFSETS = [0, 4, 4, 5, 8, 9, 10, 14]


def logprob(index: int) -> Logprob:
    """Two of the likeliest, which have the same text, and the token behind them."""
    id, _, text, data = TOKENS[index]
    alike = (TopLogprob(100, "same", -0.5), TopLogprob(101, "same", -1.5))
    return Logprob(-3.0 - index, (*alike, TopLogprob(id, text, -3.0 - index, data)), text, data)


def job(n: int = 1, **fields: Any) -> Job:
    request = Request(model="m", prompt="x", n=n, sampling=Sampling(logprobs=2))
    return Job(id=new_job_id(), tenant="t", request=msgspec.structs.replace(request, **fields), created_at=1.0)


def log(cuts: list[int]) -> list[Event]:
    """The tokens in runs that begin at *cuts*."""
    places = sorted({0, *cuts, len(TOKENS)})
    runs: list[Event] = [
        Tokens(
            start + 1,
            1,
            [id for id, *_ in TOKENS[start:end]],
            [text for _, text, *_ in TOKENS[start:end]],
            None,
            [logprob(i) for i in range(start, end)],
        )
        for start, end in pairwise(places)
    ]
    return [*runs, Ended(len(TOKENS) + 1, 1, Status.COMPLETED, ("stop",), Usage(1, len(TOKENS)))]


async def replay(events: list[Event], after: int = 0) -> AsyncIterator[Event]:
    for event in events:
        if isinstance(event, Ended):
            yield event
        elif event.last > after:
            yield event.after(after)


def streamed(dialect: type[ChunkWriter], of: Job, events: list[Event], after: int = 0) -> list[dict[str, Any]]:
    """The choices of all chunks behind the position *after*."""
    writer = dialect(of, include_usage=False)
    if after and writer.looks_back:
        writer.after, writer.replay = after, lambda: replay(events)

    async def all_of_it() -> bytes:
        return b"".join([block async for block in writer.render(replay(events, after))])

    chunks = [event.data for event in Parser().feed(asyncio.run(all_of_it()))]
    assert chunks.pop() == "[DONE]"
    return [chunk["choices"][0] for chunk in chunks]


def folded(events: list[Event]) -> Completion:
    return fold(events, 1)


TEXT = {
    "tokens": [text for _, _, text, _ in TOKENS],
    "token_logprobs": [-3.0 - i for i in range(len(TOKENS))],
    "top_logprobs": [{"same": -0.5, text: -3.0 - i} for i, (_, _, text, _) in enumerate(TOKENS)],
    "text_offset": OFFSETS,
}
CUTS = st.lists(st.integers(1, len(TOKENS) - 1), max_size=4)


@given(CUTS, st.integers(0, len(TOKENS) - 1))
def test_completions_place_every_token_in_the_whole_choice(cuts: list[int], after: int) -> None:
    of, events = job(), log(cuts)
    (choice,) = msgspec.to_builtins(TextWriter(of, include_usage=False).reply(folded(events)).choices)
    assert choice["logprobs"] == TEXT
    found: dict[str, list[Any]] = {name: [] for name in TEXT}
    for chunk in streamed(TextWriter, of, events, after):
        for name, values in (chunk["logprobs"] or {}).items():
            found[name] += values
    assert found == {name: values[after:] for name, values in TEXT.items()}


def test_choices_are_placed_by_themselves() -> None:
    ids, texts = [1, 1, 2, 2], ["ab", "abc", "d", "e"]
    events: list[Event] = [
        Tokens(1, 1, ids, texts, [0, 1, 0, 1], [Logprob(-1.0, (), text) for text in texts]),
        Ended(5, 1, Status.COMPLETED, ("stop", "stop"), Usage(1, 4)),
    ]
    parts = [part for part in streamed(TextWriter, job(n=2), events) if part["logprobs"]]
    assert [(part["index"], part["logprobs"]["text_offset"]) for part in parts] == [
        (0, [0]),
        (1, [0]),
        (0, [2]),
        (1, [3]),
    ]
    assert parts[0]["logprobs"]["top_logprobs"] == [{"ab": -1.0}], "the sampled token, where nobody asked for others"


def check_chat(entries: list[dict[str, Any]]) -> None:
    assert [entry["token"] for entry in entries] == [text for _, _, text, _ in TOKENS]
    for (_, _, text, data), entry in zip(TOKENS, entries, strict=True):
        assert bytes(entry["bytes"]) == (data or text.encode())
        alike, own = entry["top_logprobs"]
        assert alike == {"token": "same", "bytes": list(b"same"), "logprob": -0.5}
        assert own == {name: entry[name] for name in ("token", "bytes", "logprob")}, (
            "as many as asked for, it among them"
        )


@pytest.mark.parametrize("tools", [(), (Tool("f"),)], ids=["plain", "tools"])
@given(cuts=CUTS)
def test_chat_has_an_entry_for_every_token(tools: tuple[Tool, ...], cuts: list[int]) -> None:
    of, dialect = job(prompt=None, messages=(Message("user", "?"),), tools=tools), ChatWriter
    (choice,) = msgspec.to_builtins(dialect(of, include_usage=False).reply(folded(log(cuts))).choices)
    check_chat(choice["logprobs"]["content"])
    parts = streamed(dialect, of, log(cuts))
    check_chat([entry for part in parts if "logprobs" in part for entry in part["logprobs"]["content"]])


def test_a_response_has_an_entry_for_every_token() -> None:
    response = msgspec.to_builtins(whole(job(), View(), folded(log([])), None))
    check_chat(response["output"][0]["content"][0]["logprobs"])


def test_logs_of_older_versions_are_shown_as_they_are() -> None:
    old = [msgspec.json.decode(b'[-0.25,[[7,"b",-0.25]]]', type=Logprob)] * 2
    events: list[Event] = [
        Tokens(1, 1, [7, 8], ["a", "bc"], None, [*old]),
        Ended(3, 1, Status.COMPLETED, ("stop",), Usage(1, 2)),
    ]
    (choice,) = msgspec.to_builtins(TextWriter(job(), include_usage=False).reply(folded(events)).choices)
    assert choice["logprobs"]["tokens"] == ["a", "bc"]
    assert choice["logprobs"]["text_offset"] == [0, 1]
    (choice,) = msgspec.to_builtins(ChatWriter(job(), include_usage=False).reply(folded(events)).choices)
    assert [entry["bytes"] for entry in choice["logprobs"]["content"]] == [list(b"a"), list(b"bc")]
    assert (
        json.dumps(choice["logprobs"]["content"][0]["top_logprobs"])
        == '[{"token": "b", "bytes": [98], "logprob": -0.25}]'
    )
